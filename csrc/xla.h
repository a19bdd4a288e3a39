// XLA's custom calls, by which JAX reaches the kernels: functions of XLA's C interface, for registration under their
// names. XLA checks its own version of that interface when it registers them.
#pragma once

namespace qaa::xla {

// Arguments theta (P,) and x (rows, d), result features (rows, K); attributes `program`, the text that qaa::compile
// reads, and `threads`.
void* forward_handler();

// Arguments theta, x and grad (rows, K), results grad_theta (P,) in theta's type and, unless it is left out, grad_x
// (rows, d); attributes as above.
void* backward_handler();

}  // namespace qaa::xla
