"""BeamLimits: what an engine can search at once, so that a search too large is refused when it is submitted."""

from __future__ import annotations

from dataclasses import dataclass

from octavo_engine.beam_params import BeamSearchParams
from octavo_engine.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class BeamLimits:
    """The limits of one engine.

    Attributes:
        max_width: beams that one step can compute.
        num_blocks: blocks that can be allocated beside the most that may be pinned.
        block_size: tokens in a block.
    """

    max_width: int
    num_blocks: int
    block_size: int

    def num_blocks_wanted(self, width: int, num_prompt_tokens: int, num_output_tokens: int) -> int:
        """Return the most blocks a search can hold: its beams share the prompt's full blocks and nothing else.

        The last token of a beam is never computed.
        """
        num_shared = num_prompt_tokens // self.block_size
        num_computed = num_prompt_tokens + num_output_tokens - 1
        return num_shared + width * (-(-num_computed // self.block_size) - num_shared)

    def check(self, beams: BeamSearchParams, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Check that a search can run.

        Raises:
            InvalidRequest: if it has more beams than a step, or may need more blocks than there are.
        """
        width = beams.beam_width
        if width > self.max_width:
            raise InvalidRequest(
                f"beam_width is {width}, at most {self.max_width} beams run at once; lower beam_width",
                param="beam_width",
            )
        wanted = self.num_blocks_wanted(width, num_prompt_tokens, num_output_tokens)
        if wanted > self.num_blocks:
            raise InvalidRequest(
                f"{width} beams of {num_prompt_tokens} prompt and {num_output_tokens} output tokens may need {wanted} "
                f"blocks of the KV cache, which has {self.num_blocks}; lower beam_width or max_tokens, or give the "
                "cache more memory",
                param="beam_width",
            )
