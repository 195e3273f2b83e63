//! Orders that the standard library gives, each with what must not be reported.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Condvar, LazyLock, Mutex, mpsc};
use std::thread;

use proof::Word;

#[test]
fn by_join_and_by_the_end_of_a_scope() {
    for _ in 0..100 {
        let word = Arc::new(Word::default());
        let other = word.clone();
        let adds = thread::spawn(move || other.add_one());
        adds.join().unwrap();
        word.add_one();
        thread::scope(|scope| drop(scope.spawn(|| word.add_one())));
        word.add_one();
    }
}

#[test]
fn by_the_last_reference() {
    for _ in 0..100 {
        let numbers = Arc::new(vec![1u64; 4]);
        let lock = Arc::new(Mutex::new(0));
        let threads = [(); 4].map(|()| {
            let (numbers, lock) = (numbers.clone(), lock.clone());
            thread::spawn(move || *lock.lock().unwrap() += numbers[0])
        });
        drop((numbers, lock));
        threads.map(|thread| thread.join().unwrap());
    }
}

#[test]
fn by_a_channel() {
    let (send, receive) = mpsc::sync_channel::<Arc<Word>>(1);
    let adds = thread::spawn(move || {
        for _ in 0..1000 {
            let word = Arc::new(Word::default());
            word.add_one();
            send.send(word).unwrap();
        }
    });
    for word in receive {
        word.add_one();
    }
    adds.join().unwrap();
}

#[test]
fn by_a_lock_and_a_barrier() {
    let word = Word::default();
    let turns = (Mutex::new(0), Condvar::new());
    let barrier = Barrier::new(2);
    thread::scope(|scope| {
        for me in 0..2 {
            let (word, turns, barrier) = (&word, &turns, &barrier);
            scope.spawn(move || {
                for _ in 0..500 {
                    let turn = turns.0.lock().unwrap();
                    let mut turn = turns.1.wait_while(turn, |turn| *turn % 2 != me).unwrap();
                    word.add_one();
                    *turn += 1;
                    turns.1.notify_one();
                }
                barrier.wait();
                if me == 0 {
                    word.add_one();
                }
            });
        }
    });
}

#[test]
fn by_a_value_made_once() {
    static ONCE: LazyLock<(Box<u64>, AtomicU64)> =
        LazyLock::new(|| (Box::new(1), AtomicU64::new(0)));
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| ONCE.1.fetch_add(*ONCE.0, Ordering::Relaxed));
        }
    });
    assert_eq!(ONCE.1.load(Ordering::Relaxed), 8);
}
