"""Attention over samples of their own lengths in one row, and the pictures of a vision tower, without a mask.

`borders` takes the places where samples end to the language model's layers, `interface` is what these call, `kernels`
chooses what computes, `segments` computes where no kernel does, `choice` says whether a model can.
"""
