"""The CRVQ algorithm for one layer: plain tensors in and out, nothing of transformers.

`hessian` gathers what a layer's inputs are like, `importance` orders its channels, `codebook` makes codebooks by
k-means, `search` improves codes, scales and codebooks in turn, `fit` is all of it for one weight, `tables`
for those of very many rows.

Called by `pipeline`, which has the Hessians, and by `tuning`, which assembles weights from codes.
"""
