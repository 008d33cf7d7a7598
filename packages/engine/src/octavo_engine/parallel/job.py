"""Job: what rank 0 tells the others of a model before they load their parts, and what must be the same everywhere."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch

from octavo_engine.errors import RankMismatch
from octavo_engine.parallel.dual_batch import DualBatch
from octavo_engine.parallel.links import Links
from octavo_engine.parallel.pipe import Pipe
from octavo_engine.parallel.shard import LoadModel, Shard
from octavo_engine.parallel.stages import Stage
from octavo_engine.quant.choose import choose_method, native_isa
from octavo_engine.weights.load import Progress, load_model
from octavo_engine.weights.source import Source, open_source

_PACKAGES = ("octavo-engine", "octavo-kernels", "octavo-kvcache", "torch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A model that several ranks run together.

    `model` is the path of its files, `sample` stands for their contents, in hexadecimal, `versions` for the software.
    `tp_size` ranks split each layer, and `stages` says which layers, from one to before another, each group of them
    has. `device` is cpu, or cuda, where each rank takes one of its machine's GPUs. `instruction_set` is that of rank
    0's native kernels, None if it has none. Ranks wait for each other `step_seconds` within a layer, and stages
    `stage_seconds` for what the stage before makes. Steps of `dbo_token_threshold` tokens and more are computed as two
    halves (`DualBatch`), none if it is None. The rest is how it computes.
    """

    model: str
    sample: str
    versions: dict[str, str]
    tp_size: int
    stages: tuple[tuple[int, int], ...]
    device: str
    dtype: str
    int8_activations: bool
    batch_invariant: bool
    num_threads: int
    block_size: int
    kv_dtype: str
    step_seconds: float
    stage_seconds: float
    expert_parallel: bool
    quantization: str | None
    dbo_token_threshold: int | None
    instruction_set: str | None

    def encode(self) -> str:
        """Return the job as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> Job:
        """Return the job that `encode` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "stages": tuple((start, stop) for start, stop in fields["stages"])})

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self.tp_size * len(self.stages)

    @property
    def is_pipelined(self) -> bool:
        """Whether several stages share the layers, and compute several steps at once."""
        return len(self.stages) > 1

    def links(self, rank: int) -> Links:
        """Return a rank's connections, which are to be made."""
        return Links(rank, self.tp_size, len(self.stages), max_sums=1 if self.dbo_token_threshold is None else 2)

    def open(self) -> Source:
        """Open the model, if it is the one that rank 0 has, and so is the software.

        Raises:
            RankMismatch: says what differs.
            ModelNotFound, CorruptModelFile, UnsupportedModel: it cannot be read here.
        """
        own = installed_versions()
        for name in sorted(self.versions.keys() | own.keys()):
            if self.versions.get(name) != own.get(name):
                raise RankMismatch(
                    f"rank 0 has {name} {self.versions.get(name)}, this rank has {own.get(name)}; install the same "
                    "versions everywhere"
                )
        source = open_source(self.model)
        if source.sample.hex() != self.sample:
            raise RankMismatch(f"{source.path}: rank 0 has other files under this name; copy the same ones everywhere")
        if source.config.num_experts and self.device == "cpu" and native_isa() != self.instruction_set:
            raise RankMismatch(
                f"rank 0 computes with {self.instruction_set or 'torch'}, this rank with {native_isa() or 'torch'}: "
                "their last bits differ, so that they could choose other experts for a token; set OCTAVO_CPU_ISA to "
                "one that all machines have"
            )
        return source

    def device_of(self, index: int) -> torch.device:
        """Return where a rank computes that has so many others of its machine before it."""
        return torch.device("cpu") if self.device == "cpu" else torch.device(self.device, index)

    def load(self, source: Source, links: Links, device: torch.device, progress: Progress | None = None) -> Shard:
        """Load a rank's part of the model onto a device.

        Raises:
            CorruptModelFile, UnsupportedModel: as in loading a model.
        """
        config = source.config
        stage = Stage(*self.stages[links.stages.rank], config.num_layers)
        dtype = getattr(torch, self.dtype)
        pipe = Pipe(links.stages, config.hidden_size, dtype, device) if self.is_pipelined else None
        halved = DualBatch(links.tensors, self.dbo_token_threshold) if self.dbo_token_threshold else None
        return Shard(
            source,
            links.tensors,
            stage,
            pipe,
            self._loader(device),
            progress,
            expert_parallel=self.expert_parallel,
            dual_batch=halved,
        )

    def _loader(self, device: torch.device) -> LoadModel:
        """Return what loads a rank's part onto a device."""
        dtype = getattr(torch, self.dtype)
        quant = choose_method(
            device, dtype, int8_activations=self.int8_activations, batch_invariant=self.batch_invariant
        )
        return partial(
            load_model,
            device=device,
            dtype=dtype,
            quant=quant,
            batch_invariant=self.batch_invariant,
            quantization=self.quantization,
        )


def installed_versions() -> dict[str, str]:
    """Return the versions of the software that ranks must have in common, as far as it is installed as packages."""
    found = {"torch": str(torch.__version__)}
    for name in _PACKAGES[:-1]:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run out of a source tree
            continue
    return found
