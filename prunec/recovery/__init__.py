"""Gradient training after pruning: LoRA, distillation, scale tuning, full fine-tuning.

settings   what is trained, towards what, for how long; the papers' recipes
data       texts, instructions, Hub data sets, the dense model's own words -> token samples
packing    samples -> rows that do not see each other
adapters   the parameters that train, found by structure, and their merging
teacher    the dense model's predictions, kept on disk; the distillation loss
training   transformers' Trainer with a clock, a held-out loss and prunec's progress
recover    the whole of it: never returns something worse without saying so
"""
