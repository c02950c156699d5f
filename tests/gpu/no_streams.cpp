// torch's autograd asks which accelerator there is, and then for its streams, which only a driver has. Preloaded, these
// two answer in the place of libtorch's own: there is none. A backward pass on fake CUDA tensors then runs to its end.
#include <cstdint>
#include <optional>

namespace c10 {
enum class DeviceType : int8_t {};
}

namespace at::accelerator {
std::optional<c10::DeviceType> getAccelerator(bool) { return std::nullopt; }
bool isAccelerator(c10::DeviceType) { return false; }
}  // namespace at::accelerator
