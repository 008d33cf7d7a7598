"""The parts of `cpu_throughput.py`: cases, contenders, processes, summary."""
