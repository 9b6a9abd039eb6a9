"""The memory-enhanced transformer: encoder, transfer head, decoder, and what a stream holds."""
