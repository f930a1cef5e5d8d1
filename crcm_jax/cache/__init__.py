"""What a causal network keeps of earlier chunks: the cache, what a policy keeps of it, and how a storage packs it.

A policy and a storage are one file each (docs/add_a_policy.md); these tables are the only registry of either.
"""

from crcm_jax.cache.base import CachePolicy, KVCache, Seen, Storage, write
from crcm_jax.cache.policies.full import FULL, Full
from crcm_jax.cache.storages.plain import PLAIN, Plain

POLICIES: dict[str, CachePolicy] = {"full": FULL}
STORAGES: dict[str, Storage] = {"bf16": PLAIN}

__all__ = [
    "FULL",
    "PLAIN",
    "POLICIES",
    "STORAGES",
    "CachePolicy",
    "Full",
    "KVCache",
    "Plain",
    "Seen",
    "Storage",
    "write",
]
