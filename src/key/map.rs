//! Maps by key.
//!
//! A key is a digest already, so there is little left to hash. What is left keeps whoever can make keys, which takes no more
//! than trying, from making them meet in one place of a map: they would have to know two numbers of this process.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher};

use super::Key;

/// A map by key.
pub(crate) type KeyMap<V> = HashMap<Key, V, Seeds>;

/// What the hashes of one map depend on, beside the keys.
#[derive(Clone, Debug)]
pub(crate) struct Seeds([u64; 2]);

/// Hashes one key.
#[derive(Debug)]
pub(crate) struct KeyHasher {
    seeds: [u64; 2],
    hash: u64,
}

// === impl Seeds ===

impl Default for Seeds {
    fn default() -> Self {
        Self(rand::random())
    }
}

impl BuildHasher for Seeds {
    type Hasher = KeyHasher;

    fn build_hasher(&self) -> KeyHasher {
        KeyHasher { seeds: self.0, hash: 0 }
    }
}

// === impl KeyHasher ===

impl Hasher for KeyHasher {
    /// Both halves of a product of 128 bits, so that each bit of the key counts.
    fn write(&mut self, key: &[u8]) {
        let [first, second] = self.seeds;
        let word =
            |at: usize| key.get(at..at + 8).map_or(0, |word| u64::from_le_bytes(word.try_into().unwrap_or_default()));
        let product = u128::from(word(0) ^ first) * u128::from(word(8) ^ second);
        self.hash = (product >> 64) as u64 ^ product as u64 ^ word(16);
    }

    /// All keys are of one length.
    fn write_usize(&mut self, _: usize) {}

    fn finish(&self) -> u64 {
        self.hash
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Digests, of which some are alike where others differ.
    fn keys() -> impl Iterator<Item = Key> {
        (0..4096_u32).map(|number| {
            let mut key = [0; 24];
            let digest = blake3::hash(&number.to_le_bytes());
            let place = (number % 3) as usize * 8;
            key[place..place + 8].copy_from_slice(&digest.as_bytes()[..8]);
            Key::new(key)
        })
    }

    #[test]
    fn keys_spread_over_the_places_of_a_map() {
        let seeds = Seeds::default();
        let places: HashSet<u64> = keys().map(|key| seeds.hash_one(key) % 4096).collect();
        // Of 4096 thrown at random, 63 % of the places get one.
        assert!((2400..2800).contains(&places.len()), "{}", places.len());
    }

    #[test]
    fn another_process_has_other_places() {
        let [one, other] = [Seeds::default(), Seeds::default()];
        let same = keys().filter(|key| one.hash_one(key) % 4096 == other.hash_one(key) % 4096).count();
        assert!(same < 20, "{same}");
    }
}
