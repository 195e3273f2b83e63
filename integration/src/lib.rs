//! What the program `fusefs-stack` has for those who test storage.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`crashtest`] | what a power cut at any moment of a workload would leave, judged |
#![forbid(unsafe_code)]

pub mod crashtest;
