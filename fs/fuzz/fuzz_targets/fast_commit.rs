#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fusefs_stack_fuzz::fast_commit(bytes));
