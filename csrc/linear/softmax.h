// Softmax regression: the loss -ln pi_y of the label y, where pi_k = e^(p_k) / (sum of all
// e^(p_j)).
#pragma once

#include <cstdint>

namespace fusestep::linear {

// The derivatives of the loss, one for each class, at predictions p.
void softmax_derivatives(const double* p, std::int64_t classes, std::int64_t label,
                         double* derivatives);

// What stands for their integral over a path of length h, where p_k moves by -q_k times it: the
// implicit step (Kulis & Bartlett 2010, "Implicit online learning", equation 3), in which the
// derivatives are those at the predictions *after* the step:
//
//     s_k = h (pi_k(p - q s) - [k = y])
//
// It never overshoots, either; but two of h/2 are not one of h. `logs` is working memory.
void softmax_integrals(const double* p, std::int64_t classes, std::int64_t label, double h,
                       const double* q, double* integrals, double* logs);

}  // namespace fusestep::linear
