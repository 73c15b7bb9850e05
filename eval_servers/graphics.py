"""What this machine can draw with: EGL and Vulkan devices and their drivers, without a window.

    python -m eval_servers.graphics egl
    python -m eval_servers.graphics vulkan

Prints a JSON list of devices. Drivers may crash the process that loads them: ask in one of its own.
Only ctypes; the numbers are those of the Khronos headers (EGL/egl.h, EGL/eglext.h, vulkan_core.h).
"""

from __future__ import annotations

import ctypes
import ctypes.util
import json
import sys
from typing import Any, Callable, Dict, List, Sequence

_EGL_PLATFORM_DEVICE_EXT = 0x313F
_EGL_VENDOR, _EGL_VERSION = 0x3053, 0x3054
_EGL_OPENGL_API, _EGL_NONE = 0x30A2, 0x3038
_EGL_RENDERABLE_TYPE, _EGL_OPENGL_BIT = 0x3040, 0x0008
_EGL_SURFACE_TYPE, _EGL_PBUFFER_BIT = 0x3033, 0x0001
_EGL_WIDTH, _EGL_HEIGHT = 0x3057, 0x3056
_GL_RENDERER, _GL_VERSION = 0x1F01, 0x1F02
_VK_KINDS = {0: "other", 1: "integrated GPU", 2: "discrete GPU", 3: "virtual GPU", 4: "CPU"}
_MAX = 16  # devices


class GraphicsError(RuntimeError):
    """There is no such library or no device; the message says which."""


def egl() -> List[Dict[str, Any]]:
    """EGL devices that give an OpenGL context: vendor, EGL version, renderer, GL version.

    Raises:
        GraphicsError: there is none.
    """
    library = _load("EGL", "libEGL.so.1")
    # The default, a C int, would cut a 64-bit pointer in half.
    library.eglGetProcAddress.restype = ctypes.c_void_p
    query = _function(library, "eglQueryDevicesEXT", ctypes.c_uint)
    display_of = _function(library, "eglGetPlatformDisplayEXT", ctypes.c_void_p)
    devices, count = (ctypes.c_void_p * _MAX)(), ctypes.c_int()
    if not query(_MAX, devices, ctypes.byref(count)) or not count.value:
        raise GraphicsError("libEGL is there but knows no device: no GL driver is installed")
    usable = []
    for device in devices[: count.value]:
        display = display_of(_EGL_PLATFORM_DEVICE_EXT, ctypes.c_void_p(device), None)
        description = _egl_device(library, display) if display else None
        if description:
            usable.append(description)
    if not usable:
        raise GraphicsError("{} EGL devices, none with an OpenGL context".format(count.value))
    return usable


def vulkan() -> List[Dict[str, Any]]:
    """Vulkan devices: name, kind, API version.

    Raises:
        GraphicsError: there is none.
    """
    library = _load("vulkan", "libvulkan.so.1")
    # VkInstanceCreateInfo with neither application, layers nor extensions.
    info = _InstanceInfo(1, None, 0, None, 0, None, 0, None)
    instance = ctypes.c_void_p()
    status = library.vkCreateInstance(ctypes.byref(info), None, ctypes.byref(instance))
    if status != 0:
        raise GraphicsError("libvulkan is there but no driver works (VkResult {})".format(status))
    count, devices = ctypes.c_uint32(_MAX), (ctypes.c_void_p * _MAX)()
    library.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), devices)
    descriptions = []
    for device in devices[: count.value]:
        # VkPhysicalDeviceProperties: apiVersion, driverVersion, vendorID, deviceID, deviceType,
        # deviceName[256], and more that is not asked for.
        properties = ctypes.create_string_buffer(4096)
        library.vkGetPhysicalDeviceProperties(ctypes.c_void_p(device), properties)
        api = ctypes.c_uint32.from_buffer(properties, 0).value
        kind = ctypes.c_uint32.from_buffer(properties, 16).value
        name = properties.raw[20:276].split(b"\0", 1)[0].decode("utf-8", "replace")
        version = "{}.{}.{}".format(api >> 22, api >> 12 & 0x3FF, api & 0xFFF)
        descriptions.append(
            {"name": name, "kind": _VK_KINDS.get(kind, str(kind)), "version": version}
        )
    # Drivers keep threads and memory for an instance that is left open.
    library.vkDestroyInstance(instance, None)
    if not descriptions:
        raise GraphicsError("Vulkan works but knows no device")
    return descriptions


class _InstanceInfo(ctypes.Structure):
    _fields_ = (
        ("sType", ctypes.c_uint32),
        ("pNext", ctypes.c_void_p),
        ("flags", ctypes.c_uint32),
        ("pApplicationInfo", ctypes.c_void_p),
        ("enabledLayerCount", ctypes.c_uint32),
        ("ppEnabledLayerNames", ctypes.c_void_p),
        ("enabledExtensionCount", ctypes.c_uint32),
        ("ppEnabledExtensionNames", ctypes.c_void_p),
    )


def _egl_device(library: Any, display: int) -> Any:
    """Describe one display's OpenGL; None if it gives no context."""
    display = ctypes.c_void_p(display)  # type: ignore[assignment]
    library.eglQueryString.restype = ctypes.c_char_p
    for name in ("eglCreateContext", "eglCreatePbufferSurface"):
        getattr(library, name).restype = ctypes.c_void_p
    if not library.eglInitialize(display, None, None):
        return None
    vendor = library.eglQueryString(display, _EGL_VENDOR).decode()
    version = library.eglQueryString(display, _EGL_VERSION).decode()
    library.eglBindAPI(_EGL_OPENGL_API)
    wanted = _attributes(_EGL_SURFACE_TYPE, _EGL_PBUFFER_BIT, _EGL_RENDERABLE_TYPE, _EGL_OPENGL_BIT)
    config, count = ctypes.c_void_p(), ctypes.c_int()
    library.eglChooseConfig(display, wanted, ctypes.byref(config), 1, ctypes.byref(count))
    context = library.eglCreateContext(display, config, None, None) if count.value else None
    description = None
    if context:
        size = _attributes(_EGL_WIDTH, 16, _EGL_HEIGHT, 16)
        surface = ctypes.c_void_p(library.eglCreatePbufferSurface(display, config, size))
        context = ctypes.c_void_p(context)
        # Some drivers create a context that cannot be used, so it is tried.
        if library.eglMakeCurrent(display, surface, surface, context):
            get_string = _function(library, "glGetString", ctypes.c_char_p)
            description = {
                "vendor": vendor,
                "egl": version,
                "renderer": (get_string(_GL_RENDERER) or b"").decode(),
                "gl": (get_string(_GL_VERSION) or b"").decode(),
            }
    library.eglTerminate(display)
    return description


def _attributes(*pairs: int) -> Any:
    # EGL reads attribute lists up to this terminator.
    values = [*pairs, _EGL_NONE]
    return (ctypes.c_int * len(values))(*values)


def _function(library: Any, name: str, result: Any) -> Callable[..., Any]:
    # Extensions are no symbols of the library, so they are asked for by name.
    address = library.eglGetProcAddress(name.encode())
    if not address:
        raise GraphicsError("this EGL has no {}".format(name))
    return ctypes.CFUNCTYPE(result, use_errno=False)(address)


def _load(name: str, file: str) -> Any:
    for candidate in (file, ctypes.util.find_library(name)):
        if candidate:
            try:
                return ctypes.CDLL(candidate)
            except OSError:
                continue
    raise GraphicsError("{} is not installed".format(file))


def _main(arguments: Sequence[str]) -> int:
    probes = {"egl": egl, "vulkan": vulkan}
    if len(arguments) != 1 or arguments[0] not in probes:
        print("usage: python -m eval_servers.graphics {}".format("|".join(probes)), file=sys.stderr)
        return 2
    try:
        print(json.dumps(probes[arguments[0]]()))
    except GraphicsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
