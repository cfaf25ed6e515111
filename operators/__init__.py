"""Sequence operators that take the place of attention: configuration, modules, decoding state, transfer.

Torch alone: nothing here imports another part of the project. Read in this order: `config` (what can be asked for, free
of torch), `hyena` (the operator) and its kinds `channels`, `heads` and `windowed`; what they are made of, `filters`
from `base` on, `convolution`, `mixing` from `forms` on, `near`, `decoding` from `state` on and `transfer`; last
`registry` (what every operator offers, and how to build one by configuration). `native` is an optional compiled core
that computes the same, `gpu` are kernels for accelerators.
"""
