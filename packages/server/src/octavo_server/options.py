"""The options of the command line: their types, names and help."""

from pathlib import Path
from typing import Annotated

import typer

from octavo_engine.text.parsers.formats import REASONING_PARSERS, TOOL_PARSERS
from octavo_server.logs import LOG_FORMATS

_MODEL_HELP = "A GGUF file, a folder in Hugging Face layout, or a hub id. Default: the demo model."
_DTYPE_HELP = "Of activations and of the exact KV cache: auto, float32, bfloat16 or float16."
_MODE_HELP = "exact loses nothing; fast, on a CPU, rounds activations to 8 bits and keeps the KV cache in bfloat16."

ModelArgument = Annotated[str | None, typer.Argument(help=_MODEL_HELP, show_default=False)]
ModelOption = Annotated[str | None, typer.Option(help=_MODEL_HELP, show_default=False)]
Dtype = Annotated[str, typer.Option(help=_DTYPE_HELP)]
Mode = Annotated[str, typer.Option(help=_MODE_HELP)]
Quantization = Annotated[
    str | None,
    typer.Option(help="Round the linears of a model that is not quantised as it is read: int8, int4 or fp8."),
]
KVCacheDtype = Annotated[
    str, typer.Option("--kv-cache-dtype", help="Of keys and values: auto, float32, bfloat16, int8, or fp8 on a GPU.")
]
Device = Annotated[str, typer.Option(help="A torch device, or auto.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Limit on prompt and output together, in tokens.")]
Deterministic = Annotated[
    bool | None,
    typer.Option(
        "--deterministic/--no-deterministic",
        help="Answers do not depend on what else runs, bit for bit. Default: yes on a CPU; a GPU cannot.",
        show_default=False,
    ),
]
Threads = Annotated[int | None, typer.Option(help="Threads of the CPU kernels, in each process.")]
KVCacheGib = Annotated[float | None, typer.Option(help="Memory for the KV cache, in GiB.")]
KVCacheBytes = Annotated[int | None, typer.Option(help="Memory for the KV cache, in bytes.")]
HostKVGib = Annotated[
    float | None,
    typer.Option(
        help="Memory of the host for sequences that must wait, in GiB. Default: 0 on a CPU, up to 4 on a GPU."
    ),
]
HostKVBytes = Annotated[int | None, typer.Option(help="Memory of the host for sequences that must wait, in bytes.")]
Preemption = Annotated[
    str, typer.Option(help="Of sequences that lose their blocks: auto takes what costs less, else recompute or swap.")
]
MaxTokens = Annotated[int | None, typer.Option(help="The most tokens to generate. Default: what the context holds.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy. Default: the model's own.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the likeliest tokens of this total probability.")]
TopK = Annotated[int | None, typer.Option(help="Sample from this many of the likeliest tokens.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]
System = Annotated[str | None, typer.Option(help="A system message to begin with.")]

# -- of `serve` alone

Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")]
Port = Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)]
ServedModelName = Annotated[
    list[str] | None, typer.Option(help="Name for requests to use; may be given several times.")
]
TensorParallelSize = Annotated[
    int, typer.Option(help="Processes that the model is split over; on GPUs each takes one.")
]
ExpertParallel = Annotated[
    bool, typer.Option("--expert-parallel", help="Give each of these processes whole experts of a mixture.")
]
PipelineParallelSize = Annotated[
    int, typer.Option(help="Stages that the layers are shared out among, each of as many processes.")
]
EnableDBO = Annotated[
    bool, typer.Option("--enable-dbo", help="Compute one half of a step while processes add up the other.")
]
DBOTokenThreshold = Annotated[int, typer.Option(help="Tokens from which on --enable-dbo halves a step.")]
BlockSize = Annotated[int, typer.Option(help="Tokens in a block of the KV cache.")]
NumBlocks = Annotated[int | None, typer.Option(help="Blocks in the KV cache.")]
MaxNumSeqs = Annotated[int, typer.Option(help="Sequences that may run in one step.")]
MaxNumBatchedTokens = Annotated[int, typer.Option(help="Token budget of one step.")]
EnforceEager = Annotated[
    bool, typer.Option("--enforce-eager", help="On a GPU, run every step op by op instead of replaying graphs.")
]
MaxNumGraphs = Annotated[int, typer.Option(help="Graphs of decode steps that a GPU may capture.")]
MaxNumMixedGraphs = Annotated[
    int, typer.Option(help="Graphs of steps with prompts that a GPU may capture; 0 runs these op by op.")
]
NoPrefixCache = Annotated[bool, typer.Option("--no-prefix-cache", help="Compute every prompt whole.")]
MaxPinnedShare = Annotated[float, typer.Option(help="Share of the KV cache that pins may hold.")]
MaxNumTimelines = Annotated[int, typer.Option(help="Ended requests whose timelines are remembered; 0 notes nothing.")]
EnableLora = Annotated[bool, typer.Option("--enable-lora", help="Let requests name adapters (LoRA) as their model.")]
LoraModules = Annotated[
    list[str] | None,
    typer.Option(help="Adapter to serve from the start, as name=path; may be given several times. Enables adapters."),
]
LoraDir = Annotated[
    Path | None, typer.Option(help="Folder that adapters may be loaded from while the server runs. Enables adapters.")
]
MaxLoras = Annotated[int, typer.Option(help="Adapters that sequences may run with at once.")]
MaxLoraRank = Annotated[int, typer.Option(help="The highest rank that an adapter may have.")]
MaxCpuLoras = Annotated[
    int | None, typer.Option(help="Adapters kept in the host's memory. Default: as many as may run at once.")
]
LoraDtype = Annotated[str, typer.Option(help="Of adapters' matrices: auto, float32, bfloat16 or float16.")]
ToolParser = Annotated[str, typer.Option(help=f"How the model writes tool calls: {', '.join(TOOL_PARSERS)}.")]
ReasoningParser = Annotated[str, typer.Option(help=f"How the model marks reasoning: {', '.join(REASONING_PARSERS)}.")]
ApiKey = Annotated[
    list[str] | None,
    typer.Option(help="Key that requests must bring; may be given several times.", envvar="OCTAVO_API_KEY"),
]
ApiKeysFile = Annotated[
    Path | None, typer.Option(help="TOML file of keys with names and limits: a table [keys.NAME] each.")
]
AdminApiKey = Annotated[
    str | None, typer.Option(help="Key that opens the admin routes.", envvar="OCTAVO_ADMIN_API_KEY")
]
AllowedOrigin = Annotated[
    list[str] | None, typer.Option(help="Web origin that browsers may call from; may be given several times.")
]
MaxNumRequests = Annotated[int, typer.Option(help="Requests that may run or wait at once.")]
MaxBodyBytes = Annotated[int, typer.Option(help="The largest request body, in bytes.")]
StateDir = Annotated[
    str | None,
    typer.Option(help="Folder of stored responses, files and batches. Default: one per port; :memory: keeps none."),
]
MaxNumBackground = Annotated[int, typer.Option(help="Lines of batches and background responses that run at once.")]
MaxFileBytes = Annotated[int, typer.Option(help="The largest uploaded file, in bytes.")]
MaxStoredBytes = Annotated[int, typer.Option(help="Stored files take no more than about this.")]
RetentionDays = Annotated[int, typer.Option(help="How long responses and ended batches are kept.")]
RequestTimeout = Annotated[float | None, typer.Option(help="Seconds that a request may take. Default: no limit.")]
WatchdogTimeout = Annotated[
    float, typer.Option(help="Seconds that a step may take before /health is 503; 0 lets it take any time.", min=0)
]
Executor = Annotated[
    str, typer.Option(help="Runs the other ranks of a split model: processes, or ray, on a Ray cluster.")
]
RayAddress = Annotated[
    str | None, typer.Option(help="Head of the Ray cluster, host:port. Default: RAY_ADDRESS, or this machine's own.")
]
RayPlacement = Annotated[str, typer.Option(help="Of ranks on its nodes: pack, spread, strict_pack or strict_spread.")]
RankTimeout = Annotated[
    float, typer.Option(help="Seconds that a rank's machine may be out of reach before the rank counts as lost.")
]
DrainTimeout = Annotated[float, typer.Option(help="Seconds that requests have to end after SIGTERM.", min=0)]
SslCertfile = Annotated[Path | None, typer.Option(help="Certificate of the server, in PEM, for HTTPS.")]
SslKeyfile = Annotated[Path | None, typer.Option(help="Private key of the certificate, if not in its file.")]
SslCaCerts = Annotated[Path | None, typer.Option(help="Roots; clients must then show a certificate of one of them.")]
Uds = Annotated[Path | None, typer.Option(help="Unix socket to listen on in place of a host and port.")]
AccessLog = Annotated[
    bool, typer.Option("--access-log/--no-access-log", help="A line in the log for each HTTP request.")
]
LogFormat = Annotated[str, typer.Option(help=f"How the log is written: {' or '.join(LOG_FORMATS)}.")]
LogPrompts = Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log.")]
OtlpTracesEndpoint = Annotated[
    str | None, typer.Option(help="Collector for OpenTelemetry traces, such as http://localhost:4318/v1/traces.")
]
LogLevel = Annotated[str, typer.Option(help="debug, info, warning or error.")]
# -- of `run` alone

Prompt = Annotated[str, typer.Argument(help="What to ask; - reads it from standard input.")]
Raw = Annotated[bool, typer.Option("--raw", help="Go on from the prompt, without the model's chat template.")]
Stats = Annotated[bool, typer.Option("--stats", help="Say how fast the answer came, on standard error.")]
