"""Signatures that name the axes of arrays, checked: which, and by what."""

from beartype import BeartypeConf, beartype

CHECKED = ("crcm_jax.chunks", "crcm_jax.flow", "crcm_jax.models.vae", "pallas_kernels.attention.api")
"""Modules that have such signatures: every call of theirs is checked, while it runs or is traced."""

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""What looks at each argument, and asks jaxtyping about axes. Where a float is wanted, an int will do."""
