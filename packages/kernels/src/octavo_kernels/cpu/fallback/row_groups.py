"""Rows sorted by group in torch: the reference serves."""

from octavo_kernels.reference.row_groups import group_rows

__all__ = ["group_rows"]
