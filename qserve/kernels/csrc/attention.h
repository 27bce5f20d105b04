// Attention over the paged cache, and what writes that cache.
#pragma once
#include "lanes.h"
#include "scratch.h"
#include "stage.h"
#include "team.h"

namespace qserve {

void run_rotate(const Stage& stage, Team& team);
void run_attend(const Stage& stage, Scratch& scratch, Team& team);

}  // namespace qserve
