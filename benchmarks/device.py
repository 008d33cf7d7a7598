"""Everything that wants a GPU, by one command: correctness of all kernels, their speed, and the engine's.

    python benchmarks/device.py                        # all parts, one after the other
    python benchmarks/device.py --only attention       # one part, which ends within 8 minutes
    python benchmarks/device.py --smoke                # tiny sizes on a CPU, in Triton's interpreter

Needs torch 2.11 or newer with its Triton; Transformers, FlashInfer and matplotlib are used where they are installed,
and the engine's part needs what octavo-engine does. It makes its own inputs and models. Figures are printed beside the
targets, and written to `results/device/PART.json` as they come, so that a run that is cut short keeps what it has. The
exit status is 1 where a kernel was wrong or something of ours did not run; a target that is not met changes nothing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
PARTS = ("correctness", "ceilings", "attention", "small", "products", "sampling", "engine")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PARTS, help="this part; may be given several times")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU: shows that it runs, not how fast")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which a part begins no new measurement")
    parser.add_argument("--out", type=Path, help="folder of the JSON files; results/device, or a new one for --smoke")
    arguments = parser.parse_args()
    if arguments.smoke:  # before anything imports Triton
        os.environ |= {"TRITON_INTERPRET": "1", "OCTAVO_BACKEND": "triton"}
    folder = arguments.out or (
        Path(tempfile.mkdtemp(prefix="octavo-device-")) if arguments.smoke else BENCHMARKS / "results" / "device"
    )
    sys.path[:0] = [str(BENCHMARKS), *map(str, BENCHMARKS.parent.glob("packages/*/src"))]
    sound = [run_part(part, folder, arguments.minutes, smoke=arguments.smoke) for part in arguments.only or PARTS]
    print(f"written to {folder}")
    return 0 if all(sound) else 1


def run_part(part: str, folder: Path, minutes: float, *, smoke: bool) -> bool:
    """Run one part; say whether it came to its end, and for correctness whether everything was."""
    import torch
    from on_device.bench import Bench, OutOfTime

    if not smoke and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; run this on a machine with one, or pass --smoke")
    print(f"\n== {part}{' (smoke run: the timings mean nothing)' if smoke else ''}")
    device = torch.device("cpu" if smoke else "cuda")
    bench = Bench(part, device, smoke, folder / f"{part}.json", time.monotonic() + 60 * minutes)
    torch.manual_seed(0)
    try:
        importlib.import_module(f"on_device.{part}").run(bench)
    except OutOfTime:
        bench.add("the part's minutes were used up", remaining="not measured")
    except Exception:  # the other parts run all the same; the exit status says that this one did not
        traceback.print_exc()
        bench.add("the part failed", error=traceback.format_exc()[-2000:])
        bench.sound = False
    if importlib.util.find_spec("matplotlib") is not None:
        from on_device.plot import plot

        plot(bench.rows, bench.path.with_suffix(".png"))
    bench.free()
    return bench.sound


if __name__ == "__main__":
    sys.exit(main())
