// A Vulkan layer that lets SAPIEN run on lavapipe, Mesa's CPU driver, before Mesa 26.
//
// SAPIEN 2 insists on VK_KHR_external_semaphore_fd, which it needs for CUDA only; older lavapipe does
// not have it. The layer says that the extension is there, and keeps its name and its structures
// from the driver. Exporting a semaphore fails, as it would without.
//
// One instance and one device at a time in use by the entry points below: SAPIEN makes one of each.
// Built and named to the Vulkan loader by lavapipe.sh.
#include <stdlib.h>
#include <string.h>
#include <vulkan/vk_layer.h>
#include <vulkan/vulkan.h>

static const char EXTENSION[] = VK_KHR_EXTERNAL_SEMAPHORE_FD_EXTENSION_NAME;

static struct {
    VkInstance instance;
    PFN_vkGetInstanceProcAddr of_instance;
    PFN_vkGetDeviceProcAddr of_device;
    PFN_vkEnumerateDeviceExtensionProperties extensions;
    PFN_vkCreateSemaphore semaphore;
} next;

// The loader's link to what comes below, of the chain in `first`; both kinds begin alike.
static void *find_link(const void *first, VkStructureType type) {
    VkLayerInstanceCreateInfo *info = (VkLayerInstanceCreateInfo *)first;
    while (info && !(info->sType == type && info->function == VK_LAYER_LINK_INFO))
        info = (VkLayerInstanceCreateInfo *)info->pNext;
    return info;
}

static VKAPI_ATTR VkResult VKAPI_CALL create_instance(
    const VkInstanceCreateInfo *wanted, const VkAllocationCallbacks *allocator, VkInstance *made) {
    VkLayerInstanceCreateInfo *link =
        find_link(wanted->pNext, VK_STRUCTURE_TYPE_LOADER_INSTANCE_CREATE_INFO);
    if (!link) return VK_ERROR_INITIALIZATION_FAILED;
    next.of_instance = link->u.pLayerInfo->pfnNextGetInstanceProcAddr;
    link->u.pLayerInfo = link->u.pLayerInfo->pNext;
    PFN_vkCreateInstance create =
        (PFN_vkCreateInstance)next.of_instance(VK_NULL_HANDLE, "vkCreateInstance");
    if (!create) return VK_ERROR_INITIALIZATION_FAILED;
    VkResult result = create(wanted, allocator, made);
    if (result == VK_SUCCESS) {
        next.instance = *made;
        next.extensions = (PFN_vkEnumerateDeviceExtensionProperties)next.of_instance(
            *made, "vkEnumerateDeviceExtensionProperties");
    }
    return result;
}

static VKAPI_ATTR VkResult VKAPI_CALL list_extensions(
    VkPhysicalDevice device, const char *layer, uint32_t *count, VkExtensionProperties *told) {
    if (layer && *layer) {
        *count = 0;
        return VK_SUCCESS;
    }
    uint32_t total = 0;
    VkResult result = next.extensions(device, NULL, &total, NULL);
    if (result != VK_SUCCESS) return result;
    VkExtensionProperties *all = calloc(total + 1, sizeof *all);
    if (!all) return VK_ERROR_OUT_OF_HOST_MEMORY;
    result = next.extensions(device, NULL, &total, all);
    if (result < 0) {
        free(all);
        return result;
    }
    int known = 0;
    for (uint32_t i = 0; i < total; i++) known |= !strcmp(all[i].extensionName, EXTENSION);
    if (!known) {
        strcpy(all[total].extensionName, EXTENSION);
        all[total++].specVersion = 1;
    }
    if (told) {
        uint32_t room = *count < total ? *count : total;
        memcpy(told, all, room * sizeof *told);
        *count = room;
    } else {
        *count = total;
    }
    free(all);
    return told && *count < total ? VK_INCOMPLETE : VK_SUCCESS;
}

static VKAPI_ATTR VkResult VKAPI_CALL create_device(
    VkPhysicalDevice physical, const VkDeviceCreateInfo *wanted,
    const VkAllocationCallbacks *allocator, VkDevice *made) {
    VkLayerDeviceCreateInfo *link =
        find_link(wanted->pNext, VK_STRUCTURE_TYPE_LOADER_DEVICE_CREATE_INFO);
    if (!link) return VK_ERROR_INITIALIZATION_FAILED;
    PFN_vkGetInstanceProcAddr of_instance = link->u.pLayerInfo->pfnNextGetInstanceProcAddr;
    next.of_device = link->u.pLayerInfo->pfnNextGetDeviceProcAddr;
    link->u.pLayerInfo = link->u.pLayerInfo->pNext;
    PFN_vkCreateDevice create = (PFN_vkCreateDevice)of_instance(next.instance, "vkCreateDevice");
    const char **names = calloc(wanted->enabledExtensionCount + 1, sizeof *names);
    if (!create || !names) {
        free(names);
        return VK_ERROR_INITIALIZATION_FAILED;
    }
    uint32_t kept = 0;
    for (uint32_t i = 0; i < wanted->enabledExtensionCount; i++)
        if (strcmp(wanted->ppEnabledExtensionNames[i], EXTENSION))
            names[kept++] = wanted->ppEnabledExtensionNames[i];
    VkDeviceCreateInfo info = *wanted;
    info.enabledExtensionCount = kept;
    info.ppEnabledExtensionNames = names;
    VkResult result = create(physical, &info, allocator, made);
    free(names);
    if (result == VK_SUCCESS)
        next.semaphore = (PFN_vkCreateSemaphore)next.of_device(*made, "vkCreateSemaphore");
    return result;
}

// Without the request to make it exportable; a timeline stays one.
static VKAPI_ATTR VkResult VKAPI_CALL create_semaphore(
    VkDevice device, const VkSemaphoreCreateInfo *wanted, const VkAllocationCallbacks *allocator,
    VkSemaphore *made) {
    VkSemaphoreCreateInfo info = *wanted;
    VkSemaphoreTypeCreateInfo type;
    info.pNext = NULL;
    for (const VkBaseInStructure *each = wanted->pNext; each; each = each->pNext) {
        if (each->sType != VK_STRUCTURE_TYPE_SEMAPHORE_TYPE_CREATE_INFO) continue;
        type = *(const VkSemaphoreTypeCreateInfo *)each;
        type.pNext = NULL;
        info.pNext = &type;
    }
    return next.semaphore(device, &info, allocator, made);
}

static VKAPI_ATTR VkResult VKAPI_CALL export_semaphore(
    VkDevice device, const VkSemaphoreGetFdInfoKHR *info, int *file) {
    (void)device;
    (void)info;
    *file = -1;
    return VK_ERROR_FEATURE_NOT_PRESENT;
}

static VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL of_instance(VkInstance instance, const char *name);
static VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL of_device(VkDevice device, const char *name);

static PFN_vkVoidFunction ours(const char *name, int for_device) {
    static const struct {
        const char *name;
        PFN_vkVoidFunction function;
        int for_device;
    } table[] = {
        {"vkGetInstanceProcAddr", (PFN_vkVoidFunction)of_instance, 0},
        {"vkCreateInstance", (PFN_vkVoidFunction)create_instance, 0},
        {"vkCreateDevice", (PFN_vkVoidFunction)create_device, 0},
        {"vkEnumerateDeviceExtensionProperties", (PFN_vkVoidFunction)list_extensions, 0},
        {"vkGetDeviceProcAddr", (PFN_vkVoidFunction)of_device, 1},
        {"vkCreateSemaphore", (PFN_vkVoidFunction)create_semaphore, 1},
        {"vkGetSemaphoreFdKHR", (PFN_vkVoidFunction)export_semaphore, 1},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if ((table[i].for_device || !for_device) && !strcmp(table[i].name, name))
            return table[i].function;
    return NULL;
}

static VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL of_device(VkDevice device, const char *name) {
    PFN_vkVoidFunction found = ours(name, 1);
    return found ? found : next.of_device(device, name);
}

static VKAPI_ATTR PFN_vkVoidFunction VKAPI_CALL of_instance(VkInstance instance, const char *name) {
    PFN_vkVoidFunction found = ours(name, 0);
    if (found) return found;
    return next.of_instance ? next.of_instance(instance, name) : NULL;
}

__attribute__((visibility("default"))) VKAPI_ATTR VkResult VKAPI_CALL
vkNegotiateLoaderLayerInterfaceVersion(VkNegotiateLayerInterface *version) {
    version->loaderLayerInterfaceVersion = 2;
    version->pfnGetInstanceProcAddr = of_instance;
    version->pfnGetDeviceProcAddr = of_device;
    version->pfnGetPhysicalDeviceProcAddr = NULL;
    return VK_SUCCESS;
}
