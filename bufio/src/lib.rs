//! Metadata buffers over a block device, after dm-bufio.
//!
//! ```
//! use std::time::Duration;
//!
//! use blockstack::SectorCount;
//! use blockstack::backend::mem::MemDisk;
//! use blockstack::sync::Rank;
//! use bufio::{BufError, Client, ClientConfig, no_check};
//!
//! # fn main() -> Result<(), BufError> {
//! let config = ClientConfig {
//!     block_size: 4096,
//!     cache_bytes: 1 << 20,
//!     rank: Rank::FsBufio,
//!     writeback_age: Duration::from_secs(5),
//!     strict_holds: false,
//! };
//! let client = Client::new(MemDisk::new("mem0", SectorCount::new(1024)), config)?;
//! let buffer = client.read(7, no_check())?;
//! buffer.data_mut()[0] = 1;
//! buffer.mark_dirty();
//! client.write_dirty()?;
//! client.flush()?;
//! # Ok(())
//! # }
//! ```
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`client`] | the calls |
//! | [`buffer`] | a hold, guards of the content |
//! | [`validator`] | checks after a read, checksums before a write |
//! | [`error`] | what can go wrong |
//! | `state` | the phases of a buffer: the state machine and its invariants |
//! | `cache`, `map`, `read`, `lru` | map, misses, prefetch, eviction |
//! | `writeback`, `span`, `release_move` | writes and their thread; parts of a block; moves |
//! | `reserve` | memory kept back, the hold contract |
//!
//! # The rules of dm-bufio
//!
//! The text is the mail that proposed dm-bufio (Mikulas Patocka, dm-devel, 5 November 2008); where
//! the kernel of today says more, that is followed too.
//!
//! | dm-bufio | here |
//! | --- | --- |
//! | `read`, `get`, `new`, `prefetch` | [`Client::read`], [`Client::get`], [`Client::new_zeroed`] (zeros, not undefined), [`Client::prefetch`] |
//! | `release` | the drop of a [`Buffer`] |
//! | `mark_buffer_dirty`, `mark_partial_buffer_dirty` | [`Buffer::mark_dirty`], [`Buffer::mark_dirty_range`] |
//! | `write_dirty_buffers_async` | [`Client::write_dirty_async`] |
//! | `write_dirty_buffers` | [`Client::write_dirty`]; today's flushes as well: [`Client::flush`] |
//! | `issue_flush`, `issue_discard` | [`Client::flush`], [`Client::discard`] (which forgets first) |
//! | `forget`, `forget_buffers` | [`Client::forget`], [`Client::forget_range`]; a holder is detached, not spared |
//! | `release_move` | [`Client::release_move`] |
//! | `set_minimum_buffers` | [`Client::set_minimum_buffers`] |
//! | `drop_buffers`, `client_reset` | [`Client::drop_buffers`] |
//! | `get_block_size`, `get_device_size`, `get_block_number`, `get_block_data` | [`Client::block_size`], [`Client::blocks`], [`Buffer::block`], [`Buffer::data`] |
//! | `alloc_callback`, `write_callback`, `get_aux_data` | a [`Validator`] |
//!
//! ## Holds and memory
//!
//! A thread holds one buffer at a time; only one thread of a client may hold more, up to as many as
//! are in reserve. Without the rule two threads stop each other for good when memory runs out:
//!
//! ```text
//!     memory for two buffers, none in reserve
//!     thread A                          thread B
//!     a = read(1)   gets the first
//!                                       b = read(2)   gets the second
//!     read(3)       waits for memory
//!                                       read(4)       waits for memory
//!     ... A never releases 1, B never releases 2
//! ```
//!
//! With it whoever waits holds nothing, so those who hold go on, release, and wake it; and where
//! nobody of the client holds anything while other users have all memory, the buffer in reserve
//! lets one reader through, then the next. A buffer that is dirty is no obstacle, since its write
//! has memory of its own kept back, too. Only a client with [`ClientConfig::strict_holds`] is held
//! to this, and then waits rather than fail; the journal of a file system holds what it must and is
//! told [`BlkError::NoMemory`](blockstack::BlkError::NoMemory).
//!
//! Held by (in `tests/contracts`) `the_reserve_lets_one_reader_through_and_the_others_follow`,
//! `a_strict_client_makes_progress_without_memory`, `a_second_hold_of_a_strict_client_panics`,
//! `one_thread_may_hold_as_many_as_are_reserved`,
//! `a_client_that_is_not_strict_is_told_when_there_is_no_memory`,
//! `a_reader_without_memory_writes_what_is_dirty`,
//! `a_writer_that_waits_for_a_content_holds_no_memory_for_writes`, and the model
//! `the_reserve_is_enough_for_who_holds_one_buffer` (`tests/shuttle.rs`), where a wake-up that is
//! missed is a deadlock.
//!
//! ## Reads
//!
//! A block that several want at once is read once, and what failed, or did not pass its check, is
//! not cached: `readers_of_one_block_share_its_read`, `a_failed_read_is_shared_but_not_cached`,
//! `an_invalid_block_is_not_cached`, `a_bad_sector_spoils_no_block_that_was_read_with_it`,
//! `a_failing_prefetch_leaves_nothing`; models `readers_alone_read_once`,
//! `read_forget_new_and_eviction_of_one_block`,
//! `a_forgotten_buffer_stays_what_it_was_to_its_holder`.
//!
//! ## Writes and their errors
//!
//! Dirty buffers are written when they are old, when there are many ([`ClientConfig::cache_bytes`];
//! who comes for another buffer when the dirty ones alone fill the cache writes first), and on
//! demand. The first error of a write that nobody waited for is reported by the next
//! [`Client::write_dirty`], once. That alone would lie to another caller:
//!
//! ```text
//!     thread                 A: write_buffers([x])       B: write_dirty()
//!     writes x
//!                            x is being written: waits
//!     the write fails
//!                                                        takes the error
//!                            wakes: x is not being written any more, and there is no error
//! ```
//!
//! So a buffer whose write failed stays dirty (dm-bufio drops it), and A, who waits for the copy
//! that has its content, sees that it did not arrive and writes x itself. Its answer is then true of
//! its own write. Where x was pinned meanwhile, and so cannot be written, A gets the error.
//!
//! `a_background_error_is_reported_once`, `the_first_background_error_is_the_one_reported`,
//! `who_waits_for_a_background_write_that_fails_is_not_told_success`,
//! `each_of_several_waiters_hears_of_the_error`,
//! `a_waiter_hears_of_the_failed_write_of_a_buffer_that_is_pinned_by_now`,
//! `a_waiter_whose_own_write_goes_well_need_not_hear_of_another_s_error`,
//! `a_waiter_does_not_wait_for_changes_made_after_it_came`,
//! `a_forgotten_background_error_is_reported_all_the_same`,
//! `drop_buffers_keeps_what_cannot_be_written_and_its_error`,
//! `a_failed_write_stays_dirty_and_is_reported_by_its_caller`,
//! `old_dirty_buffers_are_written_by_themselves`, `pressure_starts_the_writeback`,
//! `the_limit_holds_back_who_makes_dirty_faster_than_the_disk_writes`; models
//! `who_is_told_success_has_the_content_on_the_disk`, `nothing_dirty_is_lost_between_writers`,
//! `what_is_changed_after_a_pin_is_not_written`.
//!
//! ## Parts of a block
//!
//! A write covers the shortest range with all that was marked since the last, and with what
//! [`Validator::prepare`] may change ([`Validator::prepared_range`]; by default the whole block, so
//! that no kind of block with a checksum can be written without it by mistake), in whole sectors of
//! the device. What was changed and not marked is not written. Content that was never read is
//! written whole the first time, for the disk has something else everywhere. A range that failed is
//! part of the next. (`tests/contracts/ranges.rs`, and `tests/model.rs`, which looks at each sector
//! that is written.)
//!
//! ## Moves
//!
//! [`Client::release_move`] of a buffer that nobody else holds moves its memory; of one that is
//! shared it writes the new block from a copy, without a second buffer, and keeps others from that
//! block meanwhile. `tests/contracts/moves.rs`; model `release_move_loses_nothing`.
//!
//! # Locking
//!
//! hit:     map bucket (r), released
//! miss:    map bucket (w), released; the bio is awaited with no lock held
//! write:   content (w) -> memory for writes -> state shard, released before the bio is submitted
//! end_io:  state shard; content (w) of a buffer nobody has; map bucket (w), each alone
//!
//! Hits on different blocks meet on no lock and no cache line (`map`; `benches/hit.rs`).
//! Locks of the content are the callers' and have no rank: a caller that holds several orders them
//! itself. All others are leaves. [`ClientConfig::rank`] is where the calls stand in the order.
//!
//! # Not supported
//!
//! Blocks that are no power of two (`dm_bufio_client_create` of today takes others); several dirty
//! ranges of one block (what lies between them is written too); a start sector on the device (put
//! the client on a `linear`); memory that the system can ask back (the client is told to shrink).
#![forbid(unsafe_code)]

pub mod buffer;
mod cache;
pub mod client;
pub mod error;
mod lru;
mod map;
mod read;
mod release_move;
mod reserve;
mod span;
mod state;
pub mod validator;
mod writeback;

pub use buffer::{Buffer, ReadGuard, WriteGuard};
pub use client::{Client, ClientConfig, ClientStats};
pub use error::BufError;
pub use validator::{Invalid, Validator, no_check};
