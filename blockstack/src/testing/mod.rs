//! Devices for tests: they fail, lose power, or tell what they see.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`faulty`] | fails, or holds back, the operations it is told to |
//! | [`crash`] | knows what a power cut could leave behind |
//! | [`observer`] | tells of the start and the end of each bio |

pub mod crash;
pub mod faulty;
pub mod observer;
