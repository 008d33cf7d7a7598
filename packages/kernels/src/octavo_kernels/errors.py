"""The exceptions and the one warning of this package.

KernelError
├── ShapeError          (ValueError)    a tensor's shape or stride does not fit
├── DtypeError          (TypeError)     a tensor's dtype does not fit
├── DeviceError         (ValueError)    tensors lie on different devices
├── OptionError         (ValueError)    a plain argument or OCTAVO_BACKEND has an impossible value
├── BackendUnavailable  (RuntimeError)  the backend asked for cannot run here
└── NotRecordable       (RuntimeError)  torch computes something that a recording would leave out
BackendFallbackWarning  (UserWarning)   another backend serves an op, or torch where native code does not
"""

__all__ = [
    "BackendFallbackWarning",
    "BackendUnavailable",
    "DeviceError",
    "DtypeError",
    "KernelError",
    "NotRecordable",
    "OptionError",
    "ShapeError",
]


class KernelError(Exception):
    """Base of every error that this package raises on purpose."""


class ShapeError(KernelError, ValueError):
    """A tensor has a shape or a stride that the op cannot take."""


class DtypeError(KernelError, TypeError):
    """A tensor has a dtype that the op cannot take."""


class DeviceError(KernelError, ValueError):
    """The tensors of one call lie on different devices."""


class OptionError(KernelError, ValueError):
    """A plain argument, or the variable OCTAVO_BACKEND, has a value outside its range."""


class BackendUnavailable(KernelError, RuntimeError):
    """The backend that was asked for cannot run on this machine or on these tensors."""


class NotRecordable(KernelError, RuntimeError):
    """Torch computes something in a recording, itself or for an op that native code does not serve."""


class BackendFallbackWarning(UserWarning):
    """An op runs on another backend than the one asked for, or on torch instead of native code; given once per op."""
