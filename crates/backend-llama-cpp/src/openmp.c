// Sets how long threads of GCC's OpenMP spin before they sleep. Otherwise only environment variables can, which are read before
// `main`. By default they spin for milliseconds, or hardly at all once the process has more OpenMP threads than cores.
//
// The variables are internal to libgomp. They are weak: a program that links another OpenMP has none of them, and nothing changes.
extern unsigned long long gomp_spin_count_var __attribute__((weak));
extern unsigned long long gomp_throttled_spin_count_var __attribute__((weak));

// Returns false if the variables do not exist.
_Bool ternion_openmp_spin(unsigned long long turns) {
    if (!&gomp_spin_count_var || !&gomp_throttled_spin_count_var)
        return 0;
    gomp_spin_count_var = turns;
    gomp_throttled_spin_count_var = turns;
    return 1;
}
