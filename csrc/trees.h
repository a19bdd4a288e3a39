// What plan.cpp and layout.cpp share: sums with signs over all indices, many at once (plan.h, Tree), and where a plan keeps
// its layouts.
#pragma once

#include <memory>
#include <vector>

#include "plan.h"

namespace qaa {

// Trees for masks[k] of n bits, which belongs to items[k]: one tree per independent subset; the mask 0, of which there
// may be one, goes to the first tree.
std::vector<Tree> sum_trees(const std::vector<Index>& masks, const std::vector<std::uint32_t>& items, std::uint32_t n);

std::shared_ptr<Layouts> make_layouts();

}  // namespace qaa
