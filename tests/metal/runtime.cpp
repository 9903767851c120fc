// Runs a kernel's threads as fibers and checks what they do. A kernel is compiled with clang's kernel-memory
// instrumentation: it asks here, before using memory, where the shadow of that memory is. So every access is seen with
// its size; whether a value was ever initialised is what the shadow says. Freestanding; libc by its own names.
#include "runtime.h"
#include "memory.h"
#include "fibers.h"
#include "callbacks.h"
