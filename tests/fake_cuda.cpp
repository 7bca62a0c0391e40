// Answers for a machine without a GPU: "no, nothing has run on it yet", where torch 2.14's CUDA build fails instead.
//
// The backward of fake CUDA tensors asks it of each device. It is a virtual function, whose place in the table of
// functions the compiler knows; ours takes that place.

#include <ATen/detail/CUDAHooksInterface.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

namespace {

bool nothing_has_run(const at::CUDAHooksInterface*, at::DeviceIndex) { return false; }

__attribute__((constructor)) void take_its_place() {
  bool (at::CUDAHooksInterface::*which)(at::DeviceIndex) const = &at::CUDAHooksInterface::hasPrimaryContext;
  std::size_t offset;  // of a virtual function: 1 more than its place in bytes (the Itanium C++ ABI)
  std::memcpy(&offset, &which, sizeof offset);
  char* slot = *reinterpret_cast<char* const*>(&at::detail::getCUDAHooks()) + (offset - 1);
  const std::size_t size = getpagesize(), page = reinterpret_cast<std::size_t>(slot) & ~(size - 1);
  mprotect(reinterpret_cast<void*>(page), 2 * size, PROT_READ | PROT_WRITE);
  const auto ours = &nothing_has_run;
  std::memcpy(slot, &ours, sizeof ours);
}

}  // namespace
