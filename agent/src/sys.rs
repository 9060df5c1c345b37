//! What the C library is asked that has no safe wrapper.

#![allow(unsafe_code, reason = "one call without arguments that could be wrong")]

/// Gives memory that was freed back to the kernel (malloc_trim(3)). A list of thousands of objects is
/// decoded page by page and leaves holes that the allocator would keep for the next one, which may
/// never come. Blocking: some milliseconds.
pub(crate) fn release_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes no pointer, and the allocator locks its arenas itself.
    unsafe {
        libc::malloc_trim(0);
    }
}
