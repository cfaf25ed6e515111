"""Sequence operators that take the place of attention: configuration, modules, decoding state, transfer.

Torch alone: nothing here imports another part of the project. Read in this order: `config` (what can be asked for, free
of torch), `hyena` (the operator) and its kinds `channels` and `heads`, their pieces `filters` (implicit ones; `modal`
and `fir` are the other kinds), `convolution`, `gated`, `mixing` and, for long sequences, `forms`, the decoding `state`
and `steps`, and `registry` (what every operator offers, and how to build one by configuration). `native` is an optional
compiled core that computes the same.
"""
