"""The parts of `device.py`: what is measured on a machine with a GPU, one file per part."""
