"""Kernels that are written for an instruction of Hopper, sm_90; imported where such a GPU multiplies."""
