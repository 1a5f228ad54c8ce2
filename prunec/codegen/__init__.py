"""What leaves prunec: the shrunk module, the directory that `from_pretrained` opens, its proof.

shrink    dense module + new weights -> smaller module of the same class, proven equal
hf        the directory; config says what of it the stock config can say
gate      a fresh process without prunec opens the directory and gets the same numbers
load      the way back in, without trust_remote_code
"""
