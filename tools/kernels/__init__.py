"""Triton kernels with tiles that suit a CPU, and functions that launch them on CPU tensors.

They are what `graphwright bench` measures. None of them needs anything but `triton` and `torch`: a tile is some ten times
larger than on a GPU, because one core works on it alone, and a grid needs only a few programs per core.
"""
