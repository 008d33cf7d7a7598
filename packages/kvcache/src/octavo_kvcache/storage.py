"""KVStorage: the tensors that hold the keys and values of every layer, block by block."""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

try:
    import torch

    import octavo_kernels
except ImportError as error:
    raise ImportError(
        f"KVStorage needs torch and octavo-kernels ({error}); install them with: pip install 'octavo-kvcache[torch]'"
    ) from error

from octavo_kvcache.block import DEVICE, HOST, NULL_BLOCK, BlockCopy
from octavo_kvcache.errors import InvalidArgument, UnsupportedSpec
from octavo_kvcache.spec import KVCacheSpec, group_specs
from octavo_kvcache.transfer import ids_on, transfer_blocks


class _Layer(NamedTuple):
    """What a layer is kept in: vectors [num_blocks, 2, num_kv_heads, block_size, head_dim], and the scales of codes."""

    vectors: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None


class KVStorage:
    """One tensor [num_blocks, 2, num_kv_heads, block_size, head_dim] per layer; index 0 of dimension 1 is K, 1 is V.

    Where elements are codes, two tensors [num_blocks, num_kv_heads, block_size] beside it hold the scales of the keys'
    and of the values' vectors; they are a part of their block wherever it is copied.

    Layers of different groups use one tensor together where their shapes allow it, since a block belongs to one group
    at a time: the k-th layer of each group lies in the same tensor.

    Memory is not initialised: unwritten slots hold anything, NaN included. On a CPU it comes in large pages where the
    system has them, and takes no physical memory until a block of the page is written. Null block 0 is zero.

    Blocks of the host tier have the same layout, in memory of the host that an NVIDIA or AMD GPU copies by itself.

    Args:
        specs: one per layer.
        num_blocks: blocks, null block 0 included.
        block_size: tokens per block.
        device: where the tensors live.
        num_host_blocks: blocks of the host tier, its block 0 included; 0 for none.

    Raises:
        InvalidArgument: no layer, fewer than 2 blocks, or a block size below 1.

    """

    def __init__(
        self,
        specs: Sequence[KVCacheSpec],
        num_blocks: int,
        block_size: int,
        *,
        device: torch.device | str = "cpu",
        num_host_blocks: int = 0,
    ) -> None:
        if not specs or num_blocks < 2 or block_size < 1:
            raise InvalidArgument(
                "KVStorage needs at least 1 layer, 2 blocks (block 0 is the null block) and 1 token per block, "
                f"got {len(specs)} layers, {num_blocks} blocks, block_size {block_size}"
            )
        self.num_blocks = num_blocks
        self.num_host_blocks = num_host_blocks
        self.block_size = block_size
        self.device = torch.device(device)
        self._num_blocks = {DEVICE: num_blocks, HOST: num_host_blocks}
        self._tensors: dict[str, list[torch.Tensor]] = {DEVICE: [], HOST: []}
        self._layers: dict[int, _Layer] = {}
        self._allocate(specs)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers, scales included."""
        return sum(tensor[0].numel() * tensor.element_size() for tensor in self._tensors[DEVICE])

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and the values of a layer: two views [num_blocks, num_kv_heads, block_size, head_dim].

        Raises:
            IndexError: there is no such layer.

        """
        vectors = self._layer(index).vectors
        return vectors[:, 0], vectors[:, 1]

    def scales(self, index: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the scales of a layer's keys and values, each [num_blocks, num_kv_heads, block_size] float32.

        None where its elements are no codes.

        Raises:
            IndexError: there is no such layer.

        """
        _, k_scale, v_scale = self._layer(index)
        return None if k_scale is None or v_scale is None else (k_scale, v_scale)

    def apply(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks in all layers, with the effect of one copy after the other.

        On a GPU this returns before the copies are made; what is asked of the GPU next comes after.

        Raises:
            UnsupportedSpec: tiers other than DEVICE and HOST, or a copy from the host to the host.
            InvalidArgument: a block that is out of range, or the null block as a destination.

        """
        if not copies:
            return
        for copy in copies:
            self._check(copy)
        for (src_tier, dst_tier), run in groupby(copies, lambda copy: (copy.src_tier, copy.dst_tier)):
            if src_tier == dst_tier:
                self._copy(_resolve(list(run)))
            else:  # nothing that is written is read: the last copy to a block counts
                transfer_blocks(self._tensors[src_tier], self._tensors[dst_tier], {c.dst: c.src for c in run})

    def _layer(self, index: int) -> _Layer:
        if index not in self._layers:
            raise IndexError(f"layer {index} does not exist; the storage has {self.num_layers} layers")
        return self._layers[index]

    def _copy(self, origins: dict[int, int]) -> None:
        src, dst = ids_on(self.device, origins.values()), ids_on(self.device, origins)
        octavo_kernels.copy_blocks(self._tensors[DEVICE], src, dst)  # reads everything before it writes anything

    def _check(self, copy: BlockCopy) -> None:
        num_blocks = self._num_blocks
        if not {copy.src_tier, copy.dst_tier} <= num_blocks.keys() or copy.src_tier == copy.dst_tier == HOST:
            raise UnsupportedSpec(
                f"tiers must be {DEVICE!r} and {HOST!r}, not the host twice, got {copy.src_tier!r} to {copy.dst_tier!r}"
            )
        num_src, num_dst = num_blocks[copy.src_tier], num_blocks[copy.dst_tier]
        if not 0 <= copy.src < num_src or not NULL_BLOCK < copy.dst < num_dst:
            raise InvalidArgument(
                f"copy from {copy.src_tier} block {copy.src} to {copy.dst_tier} block {copy.dst} is out of range: "
                f"src must be in [0, {num_src}), dst in [1, {num_dst})"
            )

    def _allocate(self, specs: Sequence[KVCacheSpec]) -> None:
        by_shape: dict[tuple[int, int, str], list[_Layer]] = {}
        for group in group_specs(specs):
            spec = group.spec
            layers = by_shape.setdefault((spec.num_kv_heads, spec.head_dim, spec.dtype), [])
            for position, index in enumerate(group.layers):
                if position == len(layers):
                    layers.append(self._make_layer(spec))
                self._layers[index] = layers[position]

    def _make_layer(self, spec: KVCacheSpec) -> _Layer:
        dtype = getattr(torch, spec.dtype)
        shape = (spec.num_kv_heads, self.block_size)
        if not spec.has_scales:
            return _Layer(self._make_tensor((2, *shape, spec.head_dim), dtype), None, None)
        # Whatever copies blocks takes codes as bytes: not every op of torch knows FP8.
        codes = self._make_tensor((2, *shape, spec.head_dim), torch.int8).view(dtype)
        return _Layer(codes, self._make_tensor(shape, torch.float32), self._make_tensor(shape, torch.float32))

    def _make_tensor(self, block_shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Make a tensor of blocks, and the host tier's beside it."""
        tensor = _empty((self.num_blocks, *block_shape), dtype, self.device)
        tensor[NULL_BLOCK].zero_()
        self._tensors[DEVICE].append(tensor)
        if self.num_host_blocks:
            self._tensors[HOST].append(_empty_on_host((self.num_host_blocks, *block_shape), dtype, self.device))
        return tensor


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return octavo_kernels.host_empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def _empty_on_host(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Make a tensor in the host's memory for copies from and to a device."""
    if device.type == "cuda":
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    return octavo_kernels.host_empty(shape, dtype)


def _resolve(copies: Sequence[BlockCopy]) -> dict[int, int]:
    """Find which block's old content each destination holds after one copy after the other."""
    origins: dict[int, int] = {}
    for copy in copies:
        origins[copy.dst] = origins.get(copy.src, copy.src)
    return origins
