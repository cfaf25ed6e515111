"""Sequence operators that take the place of attention: configuration, modules, decoding state, transfer.

Pure torch: nothing here imports another part of the project. Read in this order: `config` (what can be asked for,
free of torch), `hyena` (the operator), then its pieces `filters`, `convolution` and `mixing`, for long sequences
`forms`, its decoding `state`, and `registry` (what every operator offers, and how to build one by configuration).
"""
