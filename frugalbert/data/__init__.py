"""From files to batches: documents, a tokenizer, packed rows of token ids, masks."""
