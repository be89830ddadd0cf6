"""IP-Adapter-FaceID in notebooks: one photograph, a prompt, pictures of that person, with the likeness measured."""
import os

__version__ = "0.1.0"

# ONNX Runtime's official wheels report home unless they are told not to before they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# Where the public names live. They load when first used, so that `import faceid_nb` stays light.
_LAZY = dict(FaceReader="face", Face="face", norm_crop="align", FaceIDAdapter="adapter", FaceID="faceid", load="models",
             identity_similarity="measure", FaceIDError="errors")
__all__ = sorted(_LAZY)


def __getattr__(name):
    if name not in _LAZY: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__(): return sorted([*globals(), *_LAZY])
