// The next token of each row of logits: the likeliest, or one drawn.
#pragma once
#include <cstdint>

#include "team.h"

namespace qserve {

struct Sampling {
  const float* logits;        // (rows, stride), of which `vocabulary` columns count
  const float* temperatures;  // (rows,); 0: the likeliest, of equals the first
  const double* numbers;      // (rows,), in [0, 1): put through the cumulative distribution of the row's softmax
  int64_t* tokens;            // (rows,): the result
  int64_t rows;
  int64_t stride;
  int64_t vocabulary;
};

void sample_rows(const Sampling& sampling, Team& team);

}  // namespace qserve
