#pragma once

// How the copy engine sees a tensor; the driver fills it in.
struct alignas(64) TensorMap {
    unsigned char opaque[128];
};
