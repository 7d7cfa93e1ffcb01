"""Data: text files to documents, documents to tokens, tokens to batches.

`text` finds and splits the files, `tokenizer` turns bytes into ids and back, `stream`
packs ids into shuffled batches for training and into windows for evaluation. `images`
does all of it for pictures and their classes.
"""
