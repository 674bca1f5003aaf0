"""The network most tests of the model are about."""

SMALL = {
    "vocab_size": 64,
    "n_layers": 4,
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "window": 8,
    "d_state": 4,
    "bigram_buckets": 32,
    "bigram_dim": 8,
}
