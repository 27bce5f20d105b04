// The next token of each row of logits: the likeliest that is allowed, or some drawn from what temperature, top-k, top-p
// and min-p leave of these.
#pragma once
#include <cstdint>

#include "team.h"

namespace qserve {

// How one row's tokens are chosen; the beginning of a row of `draws` in ops.py. A number for each of them follows, in
// [0, 1): it is put through the cumulative distribution of what is left.
struct Draw {
  double temperature;  // 0: the likeliest, of equals the first
  double top_k;        // a whole number; 0: all
  double top_p;
  double min_p;
};

struct Sampling {
  const float* logits;            // (rows, stride), of which `vocabulary` columns count
  const double* draws;            // (rows, 4 + numbers)
  const uint8_t* const* allowed;  // (rows,): one bit a token, the lowest of the first byte first; null: all are
  int64_t* tokens;                // (rows, numbers): the result; -1 where there is nothing to choose
  int64_t rows;
  int64_t numbers;
  int64_t stride;
  int64_t vocabulary;
};

void sample_rows(const Sampling& sampling, Team& team);

}  // namespace qserve
