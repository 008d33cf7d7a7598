"""Launch configurations: where they are found, in which order, what is kept, and what a broken file says."""

import json

import pytest
import torch

import octavo_kernels as ok
from octavo_kernels import WeightFormat, tune, tuning
from octavo_kernels.tuning import Key, Measured, TuningCache

KEY = Key("packed_linear", "NVIDIA H200", "bfloat16", "16", "q4_0 64x32")
SHIPPED = {"columns": 64, "groups": 4, "num_warps": 4, "num_stages": 4}


def shipped_folder(tmp_path, **entries):
    """A folder with one file for the H200; entries: a configuration's columns by shape."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    listed = [
        {"op": KEY.op, "dtype": KEY.dtype, "rows": KEY.rows, "shape": shape, "config": {"columns": columns}}
        for shape, columns in entries.items()
    ]
    (folder / "h200.json").write_text(json.dumps({"version": 1, "device": "H200", "entries": listed}))
    return folder


def test_the_users_configuration_comes_before_shipped_ones_and_these_before_the_default(tmp_path):
    folder = shipped_folder(tmp_path, **{"*": 32, KEY.shape: 64})
    cache = TuningCache(tmp_path / "cache" / "tuned.json", folder)
    other = KEY._replace(shape="q4_0 128x32")
    assert cache.find(KEY) == {"columns": 64}
    assert cache.find(other) == {"columns": 32}  # shipped for any shape
    cache.keep(KEY, Measured({"columns": 128}, 1e-6))
    assert cache.find(KEY) == {"columns": 128}  # though another was found before
    assert cache.find(other) == {"columns": 32}
    for missing in (
        KEY._replace(device="NVIDIA H20", shape="s"),
        KEY._replace(rows="32"),
        KEY._replace(dtype="float16"),
        KEY._replace(op="weight_only_linear"),
    ):
        assert cache.find(missing) is None


def test_what_was_kept_is_there_for_later_processes_and_others_work_stays(tmp_path):
    file = tmp_path / "deep" / "tuned.json"
    first, second = TuningCache(file), TuningCache(file)
    other = KEY._replace(rows="64")
    first.keep(KEY, Measured({"columns": 32}, 2e-6))
    second.keep(other, Measured({"columns": 64, "num_stages": 3}, 3e-6))
    later = TuningCache(file)
    assert later.find(KEY) == {"columns": 32}
    assert later.find(other) == {"columns": 64, "num_stages": 3}
    assert [path.name for path in file.parent.iterdir()] == ["tuned.json"]
    assert [entry["seconds"] for entry in json.loads(file.read_text())["entries"]] == [2e-6, 3e-6]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "Expecting property name"),
        ('{"version": 2, "entries": []}', "no entries of that version"),
        ('{"version": 1, "entries": [{"op": "packed_linear"}]}', "KeyError"),
        (
            json.dumps({"version": 1, "entries": [{**KEY._asdict(), "config": {"columns": 48}, "seconds": 1.0}]}),
            "columns is 48, expected a power of two",
        ),
    ],
    ids=["no JSON", "another version", "a name is missing", "no power of two"],
)
def test_a_file_that_does_not_fit_is_refused_with_its_name(tmp_path, content, reason):
    file = tmp_path / "tuned.json"
    file.write_text(content)
    with pytest.raises(ok.OptionError, match=rf"tuning cache: .*tuned\.json .*{reason}.*; delete it"):
        TuningCache(file)


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA A100-SXM4-80GB"])
def test_what_is_shipped_serves_its_devices_and_says_that_nobody_measured_it(tmp_path, device):
    cache = TuningCache(tmp_path / "none.json")
    for rows in ("16", "32", "64", "more"):
        found = cache.find(KEY._replace(device=device, rows=rows))
        assert found is not None
        assert found.keys() == SHIPPED.keys()
    files = sorted(tuning._SHIPPED.glob("*.json"))
    assert [path.stem for path in files] == ["a100", "h100", "h200"]
    assert not any(json.loads(path.read_text())["measured"] for path in files)
    assert cache.find(KEY._replace(device="NVIDIA L4")) is None


def test_the_fastest_configuration_wins_and_what_cannot_be_launched_does_not():
    times = {32: 3.0, 64: float("inf"), 128: 2.0, 256: 2.0}
    best = tuning.measure([{"columns": columns} for columns in times], lambda config: times[config["columns"]])
    assert best == Measured({"columns": 128}, 2.0)
    with pytest.raises(ok.OptionError, match="none of 1 configurations can be launched"):
        tuning.measure([{"columns": 64}], lambda config: times[config["columns"]])


def test_rows_share_a_configuration_by_the_height_of_their_tile():
    assert [tuning.row_bucket(count) for count in (1, 16, 17, 32, 33, 64, 65)] == [
        "16", "16", "32", "32", "64", "64", "more",
    ]  # fmt: skip


def test_the_users_file_lies_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.user_file() == tmp_path / "octavo" / "kernels" / "tuned.json"


def test_a_service_without_a_home_of_its_own_has_what_is_shipped(monkeypatch, tmp_path):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tuning.Path, "home", no_home)
    tuning.tuning_cache.cache_clear()
    assert tuning.tuning_cache().find(KEY) == SHIPPED
    tuning.tuning_cache.cache_clear()

    def refused(self, **options):
        if self.name == "tuned.json":
            raise PermissionError(13, "Permission denied", str(self))
        return read(self, **options)

    read = tuning.Path.read_text
    monkeypatch.setattr(tuning.Path, "read_text", refused)
    assert TuningCache(tmp_path / "tuned.json").find(KEY) == SHIPPED


def test_tuning_a_product_tries_every_candidate_and_keeps_the_best(monkeypatch, tmp_path):
    """With a timer that likes one tile, and a device that cannot hold another."""
    matmul = pytest.importorskip("octavo_kernels.triton.matmul")
    tried = []

    class OutOfResources(Exception):
        pass

    def launched(x, weight, bias, int8_activations, out, workspace, tile):
        tried.append(tile)

    def seconds(launch):
        launch()
        if tried[-1].columns == 32:
            raise OutOfResources
        return 1e-6 if tried[-1][1:] == (64, 2, 8, 3) else 2e-6

    monkeypatch.setattr(matmul, "packed_linear", launched)
    data = torch.zeros(ok.packed_num_bytes(WeightFormat.Q4_0, 64, 32), dtype=torch.uint8)
    weight = ok.PackedWeight(data, WeightFormat.Q4_0, 64, 32)
    x = torch.zeros(3, 32, dtype=torch.bfloat16)
    cache = TuningCache(tmp_path / "tuned.json")
    best = tune.tune_packed_linear(x, weight, cache, seconds)
    assert best == Measured({"columns": 64, "groups": 2, "num_warps": 8, "num_stages": 3}, 1e-6)
    assert len(tried) == len(set(tried)) == len(list(tune.candidates()))
    assert matmul.tuning_key(x, weight) == KEY._replace(device="cpu")
    assert TuningCache(tmp_path / "tuned.json").find(matmul.tuning_key(x, weight)) == best.config
    assert matmul.tile_from(matmul.choose_tile(3, x.dtype), best.config)[1:] == (64, 2, 8, 3)
    with pytest.raises(ok.OptionError, match="a tuned configuration has groups 8, expected 1, 2 or 4"):
        matmul.tile_from(matmul.choose_tile(3, x.dtype), {"groups": 8})
    with pytest.raises(ok.OptionError, match="a tuned configuration has rows, expected columns, groups"):
        matmul.tile_from(matmul.choose_tile(3, x.dtype), {"rows": 16})


def test_a_launch_asks_the_cache_in_halves_and_never_in_fp32(monkeypatch, tmp_path):
    matmul = pytest.importorskip("octavo_kernels.triton.matmul")
    cache = TuningCache(tmp_path / "tuned.json")
    weight = ok.PackedWeight(torch.zeros(2 * 576, dtype=torch.uint8), WeightFormat.Q4_0, 64, 32)
    cache.keep(KEY, Measured({"columns": 128}, 1e-6))
    monkeypatch.setattr(matmul, "tuning_cache", lambda: cache)
    monkeypatch.setattr(matmul, "interpreted", lambda: False)
    monkeypatch.setattr(matmul, "_device_name", lambda device: KEY.device)
    halves = torch.zeros(3, 32, dtype=torch.bfloat16)
    default = matmul.choose_tile(3, torch.bfloat16)
    assert matmul._tuned_tile(halves, weight) == default._replace(columns=128)
    assert matmul._tuned_tile(halves.float(), weight) == matmul.choose_tile(3, torch.float32)
    monkeypatch.setattr(matmul, "_device_name", lambda device: "NVIDIA L4")
    assert matmul._tuned_tile(halves, weight) == default


def test_the_program_says_what_it_wants(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--shape", "64x32"]) == 1
    assert "no GPU is visible, expected one to measure on" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.main(["--shape", "64"])
    assert "'64' is no shape, expected two numbers as in 4096x14336" in capsys.readouterr().err


@pytest.fixture
def on_an_h100(monkeypatch, tmp_path):
    """Have launches ask what is shipped, as on an H100 whose user has measured nothing."""
    tuned = pytest.importorskip("octavo_kernels.triton._tuned")
    cache = TuningCache(tmp_path / "tuned.json")
    monkeypatch.setattr(tuned, "tuning_cache", lambda: cache)
    monkeypatch.setattr(tuned, "interpreted", lambda: False)
    monkeypatch.setattr(tuned, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    return cache


def int_weight():
    codes = torch.randint(16, (256, 96))
    return ok.int_weight_from_codes(codes, torch.rand(2, 96).half(), bits=4, group_size=128)


def test_products_of_integers_and_mixtures_ask_the_cache_but_not_in_fp32(on_an_h100, monkeypatch):
    moe, weight_only = (pytest.importorskip(f"octavo_kernels.triton.{name}") for name in ("moe", "weight_only"))
    tuned = pytest.importorskip("octavo_kernels.triton._tuned")
    weight, x = int_weight(), torch.zeros(3, 256, dtype=torch.bfloat16)
    assert weight_only._tuned_tile(x, weight)[1:] == (64, 16, 4, 4)
    assert moe._tuned_tile(x, 16, 8, 512) == (16, 128, 4, 4)
    assert moe._tuned_tile(x.float(), 16, 8, 512) == moe.choose_tile(16, torch.float32)
    key = tuned.tuning_key("weight_only_linear", rows=3, shape="int4 96x256", dtype=x.dtype, device=x.device)
    on_an_h100.keep(key, Measured({"columns": 32, "num_stages": 2}, 1e-6))
    assert weight_only._tuned_tile(x, weight)[1:] == (32, 16, 4, 2)
    on_an_h100.keep(key._replace(dtype="float32"), Measured({"columns": 64}, 1e-6))
    default = weight_only.choose_tile(3, weight, torch.float32)
    assert weight_only._tuned_tile(x.float(), weight) == default
    with pytest.raises(
        ok.OptionError, match=r"weight_only_linear \(triton\): a tuned configuration has rows, expected"
    ):
        tuned.with_config("weight_only_linear", default, weight_only.TUNABLE, {"rows": 32})


def attention_call(*, batch_invariant, dtype=torch.bfloat16, head_dim=128):
    call = pytest.importorskip("octavo_kernels.triton._attention_call")
    options = pytest.importorskip("octavo_kernels._options").AttentionOptions
    q, k = torch.zeros(4, 8, head_dim, dtype=dtype), torch.zeros(2, 2, 16, head_dim, dtype=dtype)
    starts, lens = torch.tensor([0, 4], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    table = torch.zeros(1, 2, dtype=torch.int32)
    chosen = options(scale=1.0, causal=True, batch_invariant=batch_invariant)
    return call.AttentionCall(q, k, k, starts, lens, chosen, torch.empty_like(q), None, table)


def test_attention_asks_the_cache_unless_its_sums_must_keep_their_order(on_an_h100, monkeypatch):
    call_of = pytest.importorskip("octavo_kernels.triton._attention_call")
    monkeypatch.setattr(call_of, "interpreted", lambda: False)
    free, fixed = (attention_call(batch_invariant=invariant) for invariant in (False, True))
    assert free.split_tile(4) == (16, 64, 4, 3)  # the kernel's own has five stages
    assert free.prefill_tile(400) == (128, 64, 8, 3)
    tuned = pytest.importorskip("octavo_kernels.triton._tuned")
    for rows, kind in ((16, "decode"), (64, "decode"), (128, "prefill")):
        key = tuned.tuning_key(
            "paged_attention", rows=rows, shape=f"{kind} 128", dtype=torch.bfloat16, device=torch.device("cpu")
        )
        on_an_h100.keep(key, Measured({"num_warps": 2}, 1e-6))
    assert (free.split_tile(4).num_warps, free.prefill_tile(400).num_warps) == (2, 2)
    assert [fixed.split_tile(4), fixed.prefill_tile(400)] == [(64, 64, 4, 5), (128, 64, 8, 3)]


def test_a_device_without_configurations_is_named_once_for_an_op(on_an_h100, monkeypatch, caplog):
    tuned = pytest.importorskip("octavo_kernels.triton._tuned")
    weight_only = pytest.importorskip("octavo_kernels.triton.weight_only")
    monkeypatch.setattr(tuned, "device_name", lambda device: "NVIDIA L4")
    tuned._say_missing.cache_clear()
    weight, x = int_weight(), torch.zeros(3, 256, dtype=torch.bfloat16)
    default = weight_only.choose_tile(3, weight, torch.bfloat16)
    for _ in range(2):
        assert weight_only._tuned_tile(x, weight) == default
    assert caplog.messages == [
        "weight_only_linear: no launch configuration for NVIDIA L4, the kernel's own serves; "
        "python -m octavo_kernels.tune measures some"
    ]


def test_tuning_a_product_by_integers_keeps_what_launches_find(on_an_h100, monkeypatch):
    weight_only = pytest.importorskip("octavo_kernels.triton.weight_only")
    launched = []
    monkeypatch.setattr(weight_only, "weight_only_linear", lambda *arguments: launched.append(arguments[-1]))

    def seconds(launch):
        launch()
        return 1e-6 if launched[-1][1:] == (128, 16, 8, 3) else 2e-6

    weight, x = int_weight(), torch.zeros(3, 256, dtype=torch.bfloat16)
    best = tune.tune_weight_only_linear(x, weight, on_an_h100, seconds)
    assert best == Measured({"columns": 128, "num_warps": 8, "num_stages": 3}, 1e-6)
    assert len(launched) == len(set(launched)) == 12
    assert weight_only._tuned_tile(x, weight)[1:] == (128, 16, 8, 3)


class Clock:
    """A timer that launches, and says that one of its calls was the fastest and that the first took too much memory."""

    def __init__(self, fastest):
        self.fastest, self.num_calls = fastest, 0

    def __call__(self, launch):
        launch()
        self.num_calls += 1
        if self.num_calls == 1:
            raise OutOfResources
        return 1e-6 if self.num_calls == self.fastest else 2e-6


class OutOfResources(Exception):
    """Triton's has this name."""


def test_tuning_a_mixture_keeps_what_launches_find(on_an_h100, monkeypatch):
    moe = pytest.importorskip("octavo_kernels.triton.moe")
    launched = []
    monkeypatch.setattr(moe, "fused_moe", lambda *arguments: launched.append(arguments[-1]))
    x, w13, w2 = (torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((40, 256), (8, 1024, 256), (8, 256, 512)))
    weights, ids = torch.rand(40, 8).topk(2)
    best = tune.tune_fused_moe(x, w13, w2, weights, ids.int(), on_an_h100, Clock(fastest=11))
    assert best == Measured({"columns": 128, "num_warps": 8, "num_stages": 3}, 1e-6)
    assert len(launched) == len(set(launched)) == 12
    assert {tile.rows for tile in launched} == {16}
    assert moe._tuned_tile(x, 16, 8, 512) == (16, 128, 8, 3) == launched[10]
    assert moe._tuned_tile(x, 32, 8, 512)[1:] != (128, 8, 3)  # another height's is another entry


@pytest.mark.parametrize(("max_query_len", "kind"), [(4, "decode"), (400, "prefill")])
def test_tuning_attention_keeps_what_launches_find(on_an_h100, monkeypatch, max_query_len, kind):
    call = attention_call(batch_invariant=False)
    attention, split = (
        pytest.importorskip(f"octavo_kernels.triton.{name}") for name in ("attention", "split_attention")
    )
    launched = {"decode": [], "prefill": []}
    monkeypatch.setattr(
        split, "split_attention", lambda call, most, _: launched["decode"].append(call.split_tile(most))
    )
    monkeypatch.setattr(attention, "prefill", lambda call, most, _: launched["prefill"].append(call.prefill_tile(most)))
    best = tune.tune_paged_attention(call, max_query_len, on_an_h100, Clock(fastest=7))
    assert best == Measured({"num_warps": 4, "num_stages": 4}, 1e-6)
    tiles = launched.pop(kind)
    assert len(tiles) == len(set(tiles)) == 12
    assert {tile[:2] for tile in tiles} == {tiles[0][:2]}  # rows and keys stay, and with them the order of sums
    assert list(launched.values()) == [[]]
    found = call.split_tile(max_query_len) if kind == "decode" else call.prefill_tile(max_query_len)
    assert found == tiles[6]
    assert found[2:] == (4, 4)


def test_attention_whose_sums_must_keep_their_order_is_not_measured(on_an_h100):
    pytest.importorskip("octavo_kernels.triton.attention")
    for call in (attention_call(batch_invariant=True), attention_call(batch_invariant=False, dtype=torch.float32)):
        with pytest.raises(ok.OptionError, match="expected fp16 or bf16, not batch-invariant"):
            tune.tune_paged_attention(call, 4, on_an_h100, Clock(fastest=2))


PROGRAM = {
    "packed_linear": (["--format", "q4_0", "--shape", "64x32", "--rows", "3"], 36),
    "weight_only_linear": (["--shape", "64x128", "--rows", "3"], 12),
    "fused_moe": (["--shape", "32x64", "--rows", "1", "--experts", "2", "--top-k", "1"], 12),
    "decode": (["--shape", "4x32", "--rows", "1", "--kv-heads", "2", "--num-seqs", "2", "--seq-len", "20"], 12),
    "prefill": (["--shape", "4x32", "--rows", "40", "--kv-heads", "2", "--num-seqs", "2", "--seq-len", "50"], 12),
}


@pytest.mark.parametrize("name", PROGRAM)
def test_what_the_program_measures_can_be_launched(interpreted, tmp_path, name):
    """In the interpreter, where the clock stands for a GPU's."""
    if not interpreted:
        pytest.skip("kernels need a GPU or the interpreter")
    arguments, num_tried = PROGRAM[name]
    op = "paged_attention" if name in ("decode", "prefill") else name
    options = tune._parser().parse_args(["--op", op, *arguments])
    cache, clock = TuningCache(tmp_path / "tuned.json"), Clock(fastest=5)
    best = tune._tune(options, options.shape[0], options.rows[0], torch.bfloat16, cache, clock, device="cpu")
    assert (clock.num_calls, best.seconds) == (num_tried, 1e-6)
    (entry,) = json.loads((tmp_path / "tuned.json").read_text())["entries"]
    assert (entry["op"], entry["device"], entry["dtype"], entry["config"]) == (op, "cpu", "bfloat16", best.config)
    assert entry["shape"].startswith(name) is (name in ("decode", "prefill"))


def test_sequences_shorter_than_their_queries_are_refused():
    pytest.importorskip("triton")
    options = tune._parser().parse_args(["--op", "paged_attention", "--shape", "8x64", "--seq-len", "10"])
    with pytest.raises(ok.OptionError, match="--seq-len is 10, expected at least the 32 of --rows"):
        tune._tune(options, (8, 64), 32, torch.bfloat16, None, None, device="cpu")
