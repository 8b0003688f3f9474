"""Names of attention implementations: what transformers calls them, what diffusers calls them, and their packages."""

# transformers' names of attention implementations -> diffusers' names of attention backends.
ATTENTION_BACKENDS = {
    "eager": "native",
    "sdpa": "native",
    "flash_attention_2": "flash",
    "flash_attention_3": "_flash_3",
    "flash_attention_4": "flash_4_hub",
    "flex_attention": "flex",
    "kernels-community/flash-attn": "flash_hub",
    "kernels-community/flash-attn2": "flash_hub",
    "kernels-community/flash-attn3": "_flash_3_hub",
    "kernels-community/vllm-flash-attn3": "_flash_3_hub",
}


ATTENTION_PACKAGES = {
    "flash_attention_2": "flash-attn",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_4": "flash-attn-4",
}


def missing_package(error: ImportError, attn_implementation: str | None) -> ImportError:
    """
    The error of an attention implementation whose package is not installed, with the package's name.

    Args:
        error: what transformers raised.
        attn_implementation: the implementation that was asked for.
    """
    package = ATTENTION_PACKAGES.get(str(attn_implementation), "kernels")
    return ImportError(
        f"`attn_implementation={attn_implementation!r}` needs the package `{package}` (`pip install {package}`), or "
        f"use 'sdpa'. {error}"
    )


__all__ = ["ATTENTION_BACKENDS", "missing_package"]
