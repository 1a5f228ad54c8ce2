"""Other forms of a directory that prunec wrote: one file an exporter, declared as entry points.

exporter   the protocol; `export` refuses, writes, compares in the real engine, then delivers
source     the directory to export
traced     its model as a torch.export program with dynamic batch and sequence
stranger   runs as a file in a process of its own: the exported file in its engine
"""
