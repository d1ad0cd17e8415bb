"""Names that the configuration, transformers and the inputs of a pack share."""

#: Of the language model's attention, in the configuration and in transformers.
VARLEN = "varlen"
#: For vision towers that know where their pictures end: they tell it to attention with "flash" in its name only, and
#: cut their tensors for all others.
VARLEN_OF_PICTURES = "varlen_flash"
#: Inputs of a pack: int32 [N + 1], where each of N segments begins and the last one ends; the longest, a number.
CU_SEQ_LENS, MAX_SEQ_LEN = "cu_seq_lens", "max_seq_len"
