import os
import re
import signal
import threading
from contextlib import suppress
from importlib.metadata import version

import httpx2
import pytest
from typer.testing import CliRunner

from octavo_engine.async_engine import AsyncEngine
from octavo_engine.errors import EngineDead, ModelNotFound
from octavo_server.cli import app


@pytest.fixture
def octavo(monkeypatch, engine):
    """Run the command on the fake engine; the configurations it was loaded with are in `octavo.configs`."""

    def load(config, progress=None):
        invoke.configs.append(config)
        progress(1, 2)
        progress(2, 2)
        if engine.broken is not None:
            raise engine.broken
        return engine

    def invoke(*arguments, **options):
        return CliRunner().invoke(app, arguments, env={"COLUMNS": "300", "OCTAVO_API_KEY": ""}, **options)

    invoke.configs = []
    monkeypatch.setattr(AsyncEngine, "from_config", staticmethod(load))
    return invoke


def test_version_lists_the_packages(octavo):
    result = octavo("version")
    assert result.exit_code == 0
    assert f"octavo-server {version('octavo-server')}\n" in result.stdout


def test_run_prints_the_answer_alone_on_standard_output(octavo, engine):
    result = octavo("run", "hi", "--max-tokens", "20", "--temperature", "0.5", "--seed", "3")
    assert result.exit_code == 0
    assert result.stdout == " Paris.\n"
    sampling = engine.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.seed) == (20, 0.5, 3)
    assert bytes(engine.requests[0].prompt_token_ids) == b"<user>hi\n<assistant>"
    assert engine.closed


def test_run_passes_a_system_message_and_a_prompt_from_standard_input(octavo, engine):
    assert octavo("run", "-", "--system", "be brief", input="hello").exit_code == 0
    assert bytes(engine.requests[0].prompt_token_ids) == b"<system>be brief\n<user>hello\n<assistant>"


def test_run_raw_goes_on_from_the_prompt(octavo, engine):
    assert octavo("run", "once", "--raw", "--max-tokens", "3").stdout == " Pa\n"
    assert bytes(engine.requests[0].prompt_token_ids) == b"once"


def test_run_says_how_fast_it_was_if_asked(octavo):
    assert re.search(r"8 tokens, first after \d+\.\d\d s, then [\d.]+ tokens/s", octavo("run", "hi", "--stats").stderr)


def test_engine_options_reach_the_configuration(octavo):
    octavo("run", "hi", "--model", "m.gguf", "--dtype", "bfloat16", "--max-model-len", "64", "--threads", "2")
    (config,) = octavo.configs
    assert (config.model, config.dtype, config.max_model_len, config.num_threads) == ("m.gguf", "bfloat16", 64, 2)
    assert config.mode == "exact"


@pytest.mark.parametrize("command", [["run", "hi"], ["chat"]], ids=lambda command: command[0])
def test_the_mode_reaches_the_configuration(octavo, command):
    octavo(*command, "--mode", "fast", "--kv-cache-dtype", "int8")
    assert [(config.mode, config.kv_cache_dtype) for config in octavo.configs] == [("fast", "int8")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "hi", "--temperature", "9"], "temperature must be less than or equal to 2, got 9.0"),
        (["run", "", "--raw"], "prompt is empty"),
        (["run", "hi", "--raw", "--system", "x"], "leave one out"),
        (["run", "hi", "--dtype", "int3"], "dtype 'int3' is not one of"),
        (["serve", "--tool-parser", "hermez"], "tool_parser 'hermez' is not one of auto, gpt_oss, hermes"),
        (["serve", "--reasoning-parser", "x"], "reasoning_parser 'x' is not one of auto, none, think"),
        (["run", "hi", "--mode", "faster"], "mode 'faster' is not one of exact, fast"),
        (
            ["run", "hi", "--kv-cache-dtype", "int4"],
            "kv_cache_dtype 'int4' is not one of auto, float32, bfloat16, int8",
        ),
        (["run", "hi", "--max-tokens", "1000"], "maximum context length is 200 tokens"),
        (["serve", "--block-size", "7"], "block_size 7 is not one of"),
        (["serve", "--expert-parallel"], "expert_parallel needs tensor_parallel_size 2 or more, got 1"),
        (["serve", "--enable-dbo"], "enable_dbo needs tensor_parallel_size 2 or more, got 1"),
        (["serve", "--tensor-parallel-size", "0"], "tensor_parallel_size must be at least 1, got 0"),
        (["serve", "--pipeline-parallel-size", "0"], "pipeline_parallel_size must be at least 1, got 0"),
        (
            ["serve", "--pipeline-parallel-size", "2", "--enable-lora"],
            "enable_lora needs pipeline_parallel_size 1, got 2",
        ),
        (
            ["serve", "--executor", "ray"],
            "executor ray runs the ranks of a model that is split; give tensor_parallel_s",
        ),
        (["serve", "--ray-placement", "near"], "ray_placement 'near' is not one of pack, spread, strict_pack"),
        (["serve", "--rank-timeout", "0"], "rank_timeout must be from 1 to 3600 seconds, got 0"),
        (["serve", "--kv-cache-gib", "1", "--kv-cache-bytes", "1"], "--kv-cache-gib and --kv-cache-bytes both came"),
        (["serve", "--host-kv-gib", "1", "--host-kv-bytes", "1"], "--host-kv-gib and --host-kv-bytes both came"),
        (["serve", "--preemption-mode", "never"], "preemption_mode 'never' is not one of"),
        (["serve", "--log-level", "loud"], "log_level 'loud'"),
        (["serve", "--max-body-bytes", "0"], "max_body_bytes must be above 0"),
        (["serve", "--request-timeout", "0"], "request_timeout must be above 0"),
        (["serve", "--log-format", "xml"], "log_format 'xml' is not one of text, json"),
        (["serve", "--api-keys-file", "/none.toml"], "cannot read API keys from /none.toml"),
        (["serve", "--api-key", "a", "--admin-api-key", "a"], "have the same digest; change one"),
        (["serve", "--ssl-keyfile", "/none.pem"], "go with --ssl-certfile"),
        (["serve", "--ssl-certfile", "/none.pem"], "cannot use /none.pem for TLS"),
        (["serve", "--uds", "/none/socket"], "cannot listen on the Unix socket /none/socket"),
        (["serve", "--lora-modules", "pirate"], "--lora-modules takes name=path"),
        (["serve", "--lora-modules", "org/fake-model=x"], "'org/fake-model' is the name of the model itself"),
        (["serve", "--lora-dir", "/none"], "lora_dir '/none' is no folder"),
        (["serve", "--enable-lora", "--max-cpu-loras", "2"], "max_cpu_loras must be at least max_loras, 8, got 2"),
        (["serve", "--lora-dtype", "int8"], "lora_dtype 'int8' is not one of"),
        (["serve", "--otlp-traces-endpoint", "collector"], "must be an http URL"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(octavo, arguments, message):
    result = octavo(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert re.fullmatch(r"error: .*\n", result.stderr)
    assert result.stdout == ""


def test_a_rank_that_torchrun_has_started_follows_the_first(octavo, monkeypatch):
    follower = pytest.importorskip("octavo_engine.parallel.follower", reason="ranks need octavo-server[local]")
    followed, ignored = [], []
    monkeypatch.setattr(follower, "follow", lambda *rank, **options: followed.append((rank, options["in_lobby"])))
    monkeypatch.setattr(signal, "signal", lambda number, handler: ignored.append((number, handler)))
    environ = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "first", "MASTER_PORT": "29500"}
    for name, value in {**environ, "TORCHELASTIC_RUN_ID": "run", "TORCHELASTIC_RESTART_COUNT": "3"}.items():
        monkeypatch.setenv(name, value)
    result = octavo("serve", "--tensor-parallel-size", "3", "--port", "0")
    assert (result.exit_code, followed) == (2, [])
    assert "torchrun has started 2 processes, tensor_parallel_size is 3; give both the same number" in result.stderr
    assert octavo("serve", "--tensor-parallel-size", "2", "--port", "0").exit_code == 0
    assert octavo("serve", "--pipeline-parallel-size", "2", "--port", "0").exit_code == 0
    assert followed == [(("first", 29500, 1), True)] * 2
    assert ignored == [(signal.SIGINT, signal.SIG_IGN), (signal.SIGTERM, signal.SIG_IGN)] * 2
    assert octavo.configs == []


def test_a_wrong_option_is_found_before_the_model_is_loaded(octavo):
    assert octavo("run", "hi", "--temperature", "9").exit_code == 2
    assert octavo("serve", "--block-size", "7", "--port", "0").exit_code == 2
    assert octavo.configs == []


def test_an_empty_message_is_a_conversation(octavo, engine):
    assert octavo("run", "").exit_code == 0
    assert bytes(engine.requests[0].prompt_token_ids) == b"<user>\n<assistant>"


@pytest.mark.parametrize("command", [["run", "hi"], ["chat"], ["serve", "--port", "0"]], ids=lambda c: c[0])
def test_a_model_that_cannot_be_loaded_is_one_line_and_exit_code_2(octavo, engine, command):
    engine.broken = ModelNotFound("no model 'x': give a file")
    result = octavo(*command)
    assert result.exit_code == 2
    assert "error: no model 'x': give a file\n" in result.stderr
    assert "Traceback" not in result.output


def test_missing_parts_of_the_local_engine_say_what_to_install(octavo, engine):
    engine.broken = ModuleNotFoundError("No module named 'torch'", name="torch")
    result = octavo("run", "hi")
    assert result.exit_code == 2
    assert "needs torch; install it: pip install 'octavo-server[local]'" in result.stderr


def test_chat_keeps_the_conversation_until_reset(octavo, engine):
    engine.replies = ["yes"]
    result = octavo("chat", "--system", "S", input="one\ntwo\n/reset\nthree\n/help\n/exit\nnever\n")
    assert result.exit_code == 0
    assert [bytes(request.prompt_token_ids).decode() for request in engine.requests] == [
        "<system>S\n<user>one\n<assistant>",
        "<system>S\n<user>one\n<assistant>yes\n<user>two\n<assistant>",
        "<system>S\n<user>three\n<assistant>",
    ]
    assert result.stdout.count("yes") == 3
    assert result.stdout.count("/reset forgets the conversation") == 2
    assert engine.closed


def test_chat_ends_with_the_input(octavo):
    assert octavo("chat", input="").exit_code == 0


def test_chat_goes_on_after_a_message_that_is_too_long(octavo, engine):
    result = octavo("chat", input=f"{'x' * 300}\nshort\n")
    assert result.exit_code == 0
    assert "maximum context length is 200 tokens" in result.stdout
    assert [bytes(request.prompt_token_ids) for request in engine.requests] == [b"<user>short\n<assistant>"]


@pytest.fixture
def interrupt_once_held(engine):
    """Press Ctrl-C when the engine waits; what comes afterwards is not held."""

    def interrupt():
        assert engine.holding.wait(10)
        engine.hold_after = None
        os.kill(os.getpid(), signal.SIGINT)
        # A loop about to fall asleep misses the signal; the real engine's next token would wake it.
        with suppress(RuntimeError):  # it has ended already
            engine.loop.call_soon_threadsafe(lambda: None)

    engine.hold_after = 3
    # A job in the background of a shell begins with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    yield
    thread.join()
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(octavo, engine, interrupt_once_held):
    result = octavo("chat", input="one\ntwo\n/exit\n")
    assert result.exit_code == 0, result.output
    assert len(engine.aborted) == 1
    assert bytes(engine.requests[1].prompt_token_ids) == b"<user>one\n<assistant> Pa\n<user>two\n<assistant>"


def test_ctrl_c_ends_run_with_code_130_and_closes_the_engine(octavo, engine, interrupt_once_held):
    result = octavo("run", "hi")
    assert result.exit_code == 130
    assert result.stdout == " Pa"
    assert len(engine.aborted) == 1
    assert engine.closed


def test_chat_ends_with_one_line_if_the_engine_dies(octavo, engine):
    def die():
        raise EngineDead("the engine stopped")

    engine.check_health = die
    result = octavo("chat", input="hi\n")
    assert result.exit_code == 2
    assert "error: the engine stopped\n" in result.stderr


def test_serve_reports_serves_and_stops_on_a_signal(octavo, engine, monkeypatch):
    """The server runs in this thread, as it must for signals; another one calls it and then interrupts."""
    seen = {}

    def call_and_interrupt(url):
        try:
            seen["health"] = httpx2.get(f"{url}/health").status_code
            seen["models"] = httpx2.get(f"{url}/v1/models", headers={"x-api-key": "k"}).json()["data"][0]["id"]
            seen["locked"] = httpx2.get(f"{url}/v1/models").status_code
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    from octavo_server import serving

    def make_server(app, **options):
        server = serving_make_server(app, **options)
        url = f"http://127.0.0.1:{ports[0]}"
        threading.Thread(target=call_and_interrupt, args=(url,)).start()
        return server

    def listen(host, port):
        listening = serving_listen(host, port)
        ports.append(listening.getsockname()[1])
        return listening

    engine.text.default_sampling = {"top_k": 20}
    ports = []
    serving_make_server, serving_listen = serving.make_server, serving.listen
    monkeypatch.setattr(serving, "make_server", make_server)
    monkeypatch.setattr(serving, "listen", listen)
    before = signal.getsignal(signal.SIGTERM)
    operations = "--watchdog-timeout", "7", "--admin-api-key", "root", "--request-timeout", "30", "--no-access-log"
    operations += ("--enforce-eager", "--max-num-graphs", "9", "--max-num-mixed-graphs", "0")
    adapters = "--lora-modules", "pirate=/p", "--max-loras", "4", "--max-lora-rank", "32"
    sizes = "--kv-cache-gib", "0.5", "--host-kv-gib", "0.25", "--preemption-mode", "swap", "--max-pinned-share", "0.5"
    result = octavo(
        "serve", "--port", "0", "--served-model-name", "m", "--api-key", "k", *sizes, *operations, *adapters
    )
    assert result.exit_code == 0, result.output
    assert seen == {"health": 200, "models": "m", "locked": 401}
    assert (octavo.configs[0].queue_policy, octavo.configs[0].watchdog_timeout) == ("fair", 7)
    assert octavo.configs[0].kv_cache_bytes == 2**29
    assert octavo.configs[0].host_kv_bytes == 2**28
    assert octavo.configs[0].preemption_mode == "swap"
    assert octavo.configs[0].max_pinned_share == 0.5
    assert octavo.configs[0].enforce_eager
    assert (octavo.configs[0].max_num_graphs, octavo.configs[0].max_num_mixed_graphs) == (9, 0)
    assert (octavo.configs[0].enable_lora, octavo.configs[0].max_loras) == (True, 4)
    assert (octavo.configs[0].max_lora_rank, octavo.configs[0].max_cpu_loras) == (32, None)
    assert engine.asked == [("load", "pirate", "/p", False)]
    assert f"serving m, pirate at http://127.0.0.1:{ports[0]}/v1 with API keys" in result.stderr
    assert "100 blocks of 16 tokens = 1600 tokens, 0.00 GiB of float32: a test asked for it" in result.stderr
    assert "mode exact, float32 on cpu, kernels: reference" in result.stderr
    assert "top_k 20 by default, from the model's generation_config.json" in result.stderr
    assert result.stderr.endswith("stopped\n")
    assert engine.closed
    assert signal.getsignal(signal.SIGTERM) is before


def test_serve_finds_a_port_in_use_before_it_loads_the_model(octavo):
    from octavo_server.serving import listen

    with listen("127.0.0.1", 0) as taken:
        result = octavo("serve", "--port", str(taken.getsockname()[1]))
    assert result.exit_code == 2
    assert "choose another --host or --port" in result.stderr
    assert octavo.configs == []


def test_ranks_go_where_the_operator_says(octavo, engine):
    engine.broken = ModelNotFound("none here")
    options = "--tensor-parallel-size", "2", "--executor", "ray", "--ray-address", "head:6379"
    octavo("serve", "--port", "0", *options, "--ray-placement", "strict_spread", "--rank-timeout", "9")
    (config,) = octavo.configs
    assert (config.executor, config.ray_address) == ("ray", "head:6379")
    assert (config.ray_placement, config.rank_timeout) == ("strict_spread", 9)


def test_a_server_that_torchrun_has_started_ends_with_its_engine(octavo, engine, monkeypatch):
    """So that torchrun starts all ranks again."""
    environ = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "first", "MASTER_PORT": "29500"}
    for name, value in {**environ, "TORCHELASTIC_RUN_ID": "run"}.items():
        monkeypatch.setenv(name, value)
    end = threading.Timer(0.5, lambda: setattr(engine, "broken", EngineDead("rank 1 cannot be reached")))
    end.start()
    result = octavo("serve", "--tensor-parallel-size", "2", "--port", "0")
    end.join()
    assert result.exit_code == 2
    assert result.stderr.endswith("error: rank 1 cannot be reached\n")
