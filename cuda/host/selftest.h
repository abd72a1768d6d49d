// What the parts of the self-test share.
#pragma once
#include "platform.h"
#include "sanitize.h"

extern int failures;
void check(bool holds, const char *what);

// That kernel bugs end the process and say what they are.
void check_bugs();
