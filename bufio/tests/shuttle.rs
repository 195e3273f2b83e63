//! Models of the state machine of a buffer, run by the checker `shuttle` over the real types.
//!
//! ```text
//! RUSTFLAGS="--cfg shuttle" cargo test --target-dir target/shuttle -p bufio --test shuttle
//! ```
//!
//! Each model runs under many schedules: drawn at random, and by the PCT algorithm. A failure prints
//! its schedule. `FUSEFS_STACK_LONG=1` runs ten times as many. The disk of the models is kept in
//! the standard library's locks, which are no points for the schedule to branch at; its bios end on
//! a thread of their own, in any order.
#![cfg(shuttle)]
#![allow(clippy::unwrap_used, reason = "a test ends where something is wrong")]

use std::sync::Arc;
use std::time::Duration;

use blockstack::device::{Limits, Stats};
use blockstack::sync::{Condvar, Mutex, Rank, mark_completion_thread};
use blockstack::{Bio, BlkError, BlkResult, BlockDevice, Op, PagePool, SectorCount};
use bufio::{Client, ClientConfig, no_check};
use shuttle::rand::RngCore;
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::thread::{JoinHandle, spawn};
use shuttle::{Config, Runner};

/// What the disk has at first in each block.
const OLD: u8 = 200;
const BLOCKS: usize = 16;

fn check(iterations: usize, model: fn()) {
    let iterations = if std::env::var_os("FUSEFS_STACK_LONG").is_some() {
        iterations * 10
    } else {
        iterations
    };
    let mut config = Config::new();
    config.stack_size = 256 << 10;
    config.silence_warnings = true;
    Runner::new(RandomScheduler::new(iterations), config.clone()).run(model);
    Runner::new(PctScheduler::new(3, iterations), config).run(model);
}

fn below(bound: usize) -> usize {
    shuttle::rand::thread_rng().next_u64() as usize % bound
}

struct Disk {
    queue: Mutex<Queue>,
    work: Condvar,
    image: std::sync::Mutex<Image>,
    stats: Stats,
}

#[derive(Default)]
struct Queue {
    bios: Vec<Bio>,
    stop: bool,
}

struct Image {
    /// Each block is of one byte; another one that was found is a torn block.
    blocks: [u8; BLOCKS],
    reads: usize,
    writing: [bool; BLOCKS],
    /// So many of the next writes may fail.
    faults: usize,
}

struct Rig {
    disk: Arc<Disk>,
    client: Option<Arc<Client>>,
    ender: Option<JoinHandle<()>>,
}

impl Rig {
    fn new() -> Self {
        Self::with(PagePool::new(2 << 20), false)
    }

    fn with(pool: PagePool, strict_holds: bool) -> Self {
        let disk = Arc::new(Disk {
            queue: Mutex::new(Rank::Queue, Queue::default()),
            work: Condvar::new(),
            image: std::sync::Mutex::new(Image {
                blocks: [OLD; BLOCKS],
                reads: 0,
                writing: [false; BLOCKS],
                faults: 0,
            }),
            stats: Stats::default(),
        });
        let runs = disk.clone();
        let ender = spawn(move || runs.run());
        let config = ClientConfig {
            block_size: 512,
            cache_bytes: 8 * 512,
            rank: Rank::FsBufio,
            writeback_age: Duration::from_secs(3600),
            strict_holds,
        };
        Self {
            client: Some(Client::with_reserve(disk.clone(), config, pool, 1).unwrap()),
            disk,
            ender: Some(ender),
        }
    }

    fn client(&self) -> Arc<Client> {
        self.client.clone().unwrap()
    }

    fn on_disk(&self, block: usize) -> u8 {
        self.disk.image.lock().unwrap().blocks[block]
    }

    /// Ends all threads; what each model ends with.
    fn end(mut self) {
        self.client = None;
        self.disk.queue.lock().stop = true;
        self.disk.work.notify_one();
        self.ender.take().unwrap().join().unwrap();
    }
}

impl Disk {
    fn run(&self) {
        mark_completion_thread();
        loop {
            let mut queue = self.queue.lock();
            while queue.bios.is_empty() {
                if queue.stop {
                    return;
                }
                self.work.wait(&mut queue);
            }
            let index = below(queue.bios.len());
            let mut bio = queue.bios.swap_remove(index);
            drop(queue);
            let res = self.serve(&mut bio);
            bio.complete(res);
        }
    }

    fn serve(&self, bio: &mut Bio) -> BlkResult {
        let mut image = self.image.lock().unwrap();
        let at = bio.sector().raw() as usize;
        match bio.op() {
            Op::Read => {
                image.reads += 1;
                bio.fill_each(|offset, to| to.fill(image.blocks[at + offset / 512]));
                Ok(())
            }
            Op::Write => {
                let len = bio.len().raw() as usize;
                image.writing[at..at + len].fill(false);
                if image.faults > 0 && below(2) == 0 {
                    image.faults -= 1;
                    return Err(BlkError::Io);
                }
                bio.for_each_bytes(|offset, from| {
                    for (next, block) in from.chunks(512).enumerate() {
                        assert!(block.iter().all(|&byte| byte == block[0]), "torn");
                        image.blocks[at + offset / 512 + next] = block[0];
                    }
                });
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl BlockDevice for Disk {
    fn name(&self) -> &str {
        "model"
    }
    fn capacity(&self) -> SectorCount {
        SectorCount::new(BLOCKS as u64)
    }
    fn limits(&self) -> Limits {
        Limits::UNLIMITED
    }
    fn stats(&self) -> &Stats {
        &self.stats
    }
    fn submit(&self, bio: Bio) {
        if bio.op() == Op::Write {
            let at = bio.sector().raw() as usize;
            let mut image = self.image.lock().unwrap();
            for writing in &mut image.writing[at..at + bio.len().raw() as usize] {
                assert!(!*writing, "two writes of a block at a time");
                *writing = true;
            }
        }
        self.queue.lock_nested().bios.push(bio);
        self.work.notify_one();
    }
}

/// Content and mark, as every user does it.
fn fill(client: &Client, block: u64, tag: u8) {
    let held = client.read(block, no_check()).unwrap();
    held.data_mut().fill(tag);
    held.mark_dirty();
}

fn content(client: &Client, block: u64) -> u8 {
    let held = client.read(block, no_check()).unwrap();
    let data = held.data();
    assert!(data.iter().all(|&byte| byte == data[0]), "torn");
    data[0]
}

fn threads(client: &Arc<Client>, bodies: &[fn(&Client)]) -> Vec<JoinHandle<()>> {
    let spawned = bodies.iter().map(|&body| {
        let client = client.clone();
        spawn(move || body(&client))
    });
    spawned.collect()
}

fn join(threads: Vec<JoinHandle<()>>) {
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn readers_of_a_block_share_its_read() {
    check(2000, || {
        let rig = Rig::new();
        let client = rig.client();
        let read = |client: &Client| assert_eq!(content(client, 1), OLD);
        join(threads(
            &client,
            &[read, read, |client| client.prefetch(0, 3)],
        ));
        let reads = rig.disk.image.lock().unwrap().reads;
        assert!(reads <= 3, "{reads} reads");
        drop(client);
        rig.end();
    });
}

#[test]
fn readers_alone_read_once() {
    check(1500, || {
        let rig = Rig::new();
        let client = rig.client();
        let read = |client: &Client| assert_eq!(content(client, 1), OLD);
        join(threads(&client, &[read, read, read]));
        assert_eq!(rig.disk.image.lock().unwrap().reads, 1);
        drop(client);
        rig.end();
    });
}

#[test]
fn read_forget_new_and_eviction_of_one_block() {
    check(2000, || {
        let rig = Rig::new();
        let client = rig.client();
        fill(&client, 1, 5);
        client.write_dirty_async();
        let running = threads(
            &client,
            &[
                |client| assert!(matches!(content(client, 1), OLD | 5 | 0 | 7)),
                |client| client.forget(1),
                |client| {
                    let held = client.new_zeroed(1, no_check()).unwrap();
                    held.data_mut().fill(7);
                    held.mark_dirty();
                },
                |client| client.shrink(0),
            ],
        );
        join(running);
        client.write_dirty().unwrap();
        assert_eq!(content(&client, 1), rig.on_disk(1), "the cache is the disk");
        assert_eq!(client.stats().dirty, 0);
        drop(client);
        rig.end();
    });
}

#[test]
fn a_forgotten_buffer_stays_what_it_was_to_its_holder() {
    check(1500, || {
        let rig = Rig::new();
        let client = rig.client();
        fill(&client, 1, 5);
        client.write_dirty_async();
        let holder = client.get(1).unwrap();
        let running = threads(
            &client,
            &[|client| {
                client.forget(1);
                let held = client.new_zeroed(1, no_check()).unwrap();
                held.data_mut().fill(7);
                held.mark_dirty();
            }],
        );
        join(running);
        assert_eq!(holder.data()[0], 5);
        holder.data_mut().fill(9);
        holder.mark_dirty();
        client.write_dirty().unwrap();
        assert_eq!(rig.on_disk(1), 7);
        drop((holder, client));
        rig.end();
    });
}

#[test]
fn nothing_dirty_is_lost_between_writers() {
    check(2000, || {
        let rig = Rig::new();
        let client = rig.client();
        let running = threads(
            &client,
            &[
                |client| {
                    fill(client, 1, 1);
                    fill(client, 1, 2);
                },
                |client| {
                    fill(client, 2, 3);
                    client.write_dirty().unwrap();
                },
                Client::write_dirty_async,
            ],
        );
        join(running);
        assert_eq!(rig.on_disk(2), 3, "written when the call ends");
        client.write_dirty().unwrap();
        assert_eq!(rig.on_disk(1), 2);
        assert_eq!(client.stats().dirty, 0);
        drop(client);
        rig.end();
    });
}

/// Three write one buffer, in any order with the thread, to a disk that fails at times.
#[test]
fn who_is_told_success_has_the_content_on_the_disk() {
    check(3000, || {
        let rig = Rig::new();
        let client = rig.client();
        fill(&client, 1, 5);
        rig.disk.image.lock().unwrap().faults = 3;
        client.write_dirty_async();
        let running: Vec<_> = (0..2)
            .map(|_| {
                let (client, disk) = (client.clone(), rig.disk.clone());
                spawn(move || {
                    let held = client.get(1).unwrap();
                    if client.write_buffers(&[held]).is_ok() {
                        assert_eq!(disk.image.lock().unwrap().blocks[1], 5);
                    }
                })
            })
            .collect();
        join(running);
        rig.disk.image.lock().unwrap().faults = 0;
        // At most one error is kept, for one call.
        if client.write_dirty().is_err() {
            client.write_dirty().unwrap();
        }
        assert_eq!(rig.on_disk(1), 5);
        drop(client);
        rig.end();
    });
}

#[test]
fn what_is_changed_after_a_pin_is_not_written() {
    check(2000, || {
        let rig = Rig::new();
        let client = rig.client();
        fill(&client, 1, 5);
        let running = threads(
            &client,
            &[
                |client| client.write_dirty().unwrap(),
                Client::write_dirty_async,
            ],
        );
        let held = client.get(1).unwrap();
        held.pin();
        held.data_mut().fill(9);
        held.mark_dirty();
        join(running);
        client.write_dirty().unwrap();
        assert_ne!(rig.on_disk(1), 9);
        held.unpin();
        client.write_dirty().unwrap();
        assert_eq!(rig.on_disk(1), 9);
        drop((held, client));
        rig.end();
    });
}

#[test]
fn release_move_loses_nothing() {
    check(3000, || {
        let rig = Rig::new();
        let client = rig.client();
        fill(&client, 1, 5);
        client.write_dirty_async();
        let source = client.get(1).unwrap();
        let running = threads(
            &client,
            &[
                |client| assert!(matches!(content(client, 2), OLD | 5)),
                |client| {
                    if let Some(held) = client.get(1) {
                        shuttle::thread::yield_now();
                        assert_eq!(held.data()[0], 5);
                    }
                },
                |client| client.forget(2),
            ],
        );
        // Not together with the one that forgets, which may come last.
        let (mut running, forgets) = {
            let mut running = running;
            let forgets = running.pop().unwrap();
            (running, forgets)
        };
        forgets.join().unwrap();
        client.release_move(source, 2).unwrap();
        running.drain(..).for_each(|thread| thread.join().unwrap());
        client.write_dirty().unwrap();
        assert_eq!(content(&client, 2), 5);
        assert_eq!((rig.on_disk(1), rig.on_disk(2)), (5, 5));
        drop(client);
        rig.end();
    });
}

/// No memory but the reserves: each thread holds one buffer at a time, and all get through. A
/// wake-up that is missed is a deadlock here, for nothing is timed.
#[test]
fn the_reserve_is_enough_for_who_holds_one_buffer() {
    check(1000, || {
        let pool = PagePool::new(2 << 20);
        let rig = Rig::with(pool.clone(), true);
        let mut hog = Vec::new();
        for size in [1 << 20, 256 << 10, 64 << 10, 16 << 10, 8 << 10, 4 << 10] {
            hog.extend(std::iter::from_fn(|| pool.alloc(size).ok()));
        }
        let client = rig.client();
        let running = threads(
            &client,
            &[
                |client| {
                    fill(client, 1, 1);
                    fill(client, 2, 2);
                },
                |client| assert_eq!(content(client, 3), OLD),
                |client| {
                    let held = client.new_zeroed(4, no_check()).unwrap();
                    held.data_mut().fill(4);
                    held.mark_dirty();
                },
            ],
        );
        join(running);
        client.write_dirty().unwrap();
        assert_eq!([1, 2, 4].map(|block| rig.on_disk(block)), [1, 2, 4]);
        drop(client);
        rig.end();
    });
}
