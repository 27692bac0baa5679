// kernels.cu as host code: a loop over the grid's threads takes the place of the card.
static thread_local long long host_index;
#define KERNEL_INDEX host_index
#include KERNEL_SOURCE

typedef void (*Kernel)(const signed char*, const bits16*, void*, long long, int, int, int);

extern "C" void walk(Kernel kernel, long long threads, const signed char* packed, const bits16* scale, void* out,
                     long long rows, int columns, int stride, int wide) {
    for (host_index = 0; host_index < threads; host_index++) kernel(packed, scale, out, rows, columns, stride, wide);
}

// A thread outside the grid must touch nothing, so this one would crash if it did.
extern "C" void walk_one(Kernel kernel, long long index, long long rows, int columns) {
    host_index = index;
    kernel(nullptr, nullptr, nullptr, rows, columns, columns, 1);
}
