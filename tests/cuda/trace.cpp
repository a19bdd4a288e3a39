// What a warp's accesses to memory cost, from the kernels' own code: they are compiled with -fsanitize=thread, and
// this file takes the place of the sanitizer's runtime, which is told of every load and store.
//
// The k-th time that the lanes of a warp come to an instruction is one request. Shared memory has 32 banks of 4 bytes;
// a request takes as many passes as the bank with most of its words has (16-byte accesses go by quarters of a warp,
// 8-byte ones by halves). Global memory moves sectors of 32 bytes. At best a request takes as many as its bytes fill.
#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "emulator.h"

namespace {

struct Instruction {
  std::uintptr_t address;  // in the program
  emulator::Memory memory;
  bool writes;
  unsigned size;
  auto operator<=>(const Instruction&) const = default;
};
struct Warp {
  unsigned block, warp;
  auto operator<=>(const Warp&) const = default;
};
using Addresses = std::vector<std::uintptr_t>[32];  // of each lane, in order
std::map<std::pair<Instruction, Warp>, Addresses> accesses;

void access(std::uintptr_t instruction, void* data, unsigned size, bool writes) {
  const emulator::Memory memory = emulator::memory_of(data);
  if (memory != emulator::Memory::shared && memory != emulator::Memory::global) return;
  const Warp warp{blockIdx.x, threadIdx.x / 32};
  accesses[{{instruction, memory, writes, size}, warp}][threadIdx.x % 32].push_back(std::uintptr_t(data));
}

struct Cost {
  std::size_t requests = 0, transactions = 0, at_best = 0;
};

std::size_t divided(std::size_t n, std::size_t by) { return (n + by - 1) / by; }

using Lanes = std::vector<std::pair<unsigned, std::uintptr_t>>;  // and their addresses

void add_request(Cost& cost, const Instruction& instruction, const Lanes& lanes) {
  ++cost.requests;
  if (instruction.memory == emulator::Memory::global) {
    std::set<std::uintptr_t> bytes, sectors;
    for (const auto& [lane, address] : lanes) {
      for (unsigned b = 0; b < instruction.size; ++b) bytes.insert(address + b);
    }
    for (const std::uintptr_t byte : bytes) sectors.insert(byte / 32);
    cost.transactions += sectors.size();
    cost.at_best += divided(bytes.size(), 32);
    return;
  }
  const unsigned together = instruction.size <= 4 ? 32 : 128 / instruction.size;
  for (unsigned first = 0; first < 32; first += together) {
    std::set<std::uintptr_t> words;
    for (const auto& [lane, address] : lanes) {
      if (lane < first || lane >= first + together) continue;
      for (unsigned b = 0; b < instruction.size; b += 4) words.insert((address + b) / 4);
    }
    std::size_t in_bank[32] = {};
    for (const std::uintptr_t word : words) ++in_bank[word % 32];
    cost.transactions += *std::max_element(std::begin(in_bank), std::end(in_bank));
    cost.at_best += divided(words.size(), 32);
  }
}

}  // namespace

// Forgets everything and returns lines "address memory access size requests transactions at_best".
extern "C" const char* qaa_trace() {
  std::map<Instruction, Cost> costs;
  for (const auto& [key, lanes] : accesses) {
    std::size_t most = 0;
    for (const auto& addresses : lanes) most = std::max(most, addresses.size());
    for (std::size_t k = 0; k < most; ++k) {
      Lanes request;
      for (unsigned lane = 0; lane < 32; ++lane) {
        if (k < lanes[lane].size()) request.emplace_back(lane, lanes[lane][k]);
      }
      add_request(costs[key.first], key.first, request);
    }
  }
  accesses.clear();
  static std::string lines;
  lines.clear();
  for (const auto& [instruction, cost] : costs) {
    lines += std::to_string(instruction.address);
    lines += instruction.memory == emulator::Memory::shared ? " shared " : " global ";
    lines += instruction.writes ? "write " : "read ";
    for (const std::size_t number : {std::size_t{instruction.size}, cost.requests, cost.transactions, cost.at_best}) {
      lines += std::to_string(number) + ' ';
    }
    lines += '\n';
  }
  return lines.c_str();
}

#define QAA_HERE std::uintptr_t(__builtin_return_address(0))
#define QAA_ACCESS(size)                                                                      \
  extern "C" void __tsan_read##size(void* data) { access(QAA_HERE, data, size, false); }      \
  extern "C" void __tsan_write##size(void* data) { access(QAA_HERE, data, size, true); }      \
  extern "C" void __tsan_unaligned_read##size(void* data) { access(QAA_HERE, data, size, false); } \
  extern "C" void __tsan_unaligned_write##size(void* data) { access(QAA_HERE, data, size, true); }
QAA_ACCESS(1)
QAA_ACCESS(2)
QAA_ACCESS(4)
QAA_ACCESS(8)
QAA_ACCESS(16)
extern "C" void __tsan_read_range(void* data, std::size_t size) { access(QAA_HERE, data, unsigned(size), false); }
extern "C" void __tsan_write_range(void* data, std::size_t size) { access(QAA_HERE, data, unsigned(size), true); }
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
