/*
 * A PKCS#11 module that stands before a real one and misbehaves on command.
 *
 * CHANCERY_SHIM_MODULE names the real module, CHANCERY_SHIM_CONTROL a file of
 * 64-bit words that the test maps too (shim.go has their meaning). It forwards
 * everything; the functions below also count, delay, fail, hang or corrupt.
 *
 * CK_FUNCTION_LIST is a version (two octets) and function pointers in the fixed
 * order of PKCS#11 v2.40, pkcs11f.h, so no header is needed.
 */
#include <dlfcn.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

typedef unsigned long ulong_t;
typedef ulong_t rv_t;

struct list {
	unsigned char version[2];
	void *f[68];
};

enum { GET_TOKEN_INFO = 6, OPEN_SESSION = 12, LOGIN = 18, GET_ATTRIBUTE = 24,
	FIND_INIT = 26, SIGN_INIT = 42, SIGN = 43, GENERATE_PAIR = 59, RANDOM = 64 };

enum { W_LOGINS, W_SIGNS, W_DELAY_US, W_HANG, W_CORRUPT_EVERY, W_RUNNING,
	W_PEAK, W_TOKEN_FLAGS, W_FAIL_FUNCTION, W_FAIL_RV, W_FAIL_COUNT,
	W_CORRUPTED, W_FAILED, W_MAX_SESSIONS, W_WORDS };

static struct list *real;
static struct list ours;
static _Atomic unsigned long *words;

static void nap(unsigned long us)
{
	struct timespec t = { us / 1000000, (us % 1000000) * 1000 };
	nanosleep(&t, NULL);
}

/* fails hangs if function shall, and says whether it shall fail now, and with
 * what. sign hangs later, when it counts as running. */
static rv_t fails(ulong_t function)
{
	while (function != SIGN && atomic_load(&words[W_HANG]) == function)
		nap(1000);
	if (atomic_load(&words[W_FAIL_FUNCTION]) != function)
		return 0;
	unsigned long left = atomic_load(&words[W_FAIL_COUNT]);
	while (left > 0)
		if (atomic_compare_exchange_weak(&words[W_FAIL_COUNT], &left, left - 1)) {
			atomic_fetch_add(&words[W_FAILED], 1);
			return atomic_load(&words[W_FAIL_RV]);
		}
	return 0;
}

static rv_t get_token_info(ulong_t slot, unsigned char *info)
{
	rv_t rv = fails(GET_TOKEN_INFO);
	if (rv == 0)
		rv = ((rv_t (*)(ulong_t, void *))real->f[GET_TOKEN_INFO])(slot, info);
	if (rv == 0) {
		/* label 32, manufacturer 32, model 16, serial 16, then flags */
		ulong_t flags;
		memcpy(&flags, info + 96, sizeof flags);
		if (flags & 0x400) /* CKF_TOKEN_INITIALIZED */
			flags |= atomic_load(&words[W_TOKEN_FLAGS]);
		memcpy(info + 96, &flags, sizeof flags);
		ulong_t most = atomic_load(&words[W_MAX_SESSIONS]);
		if (most) /* ulMaxRwSessionCount, after two counts */
			memcpy(info + 120, &most, sizeof most);
	}
	return rv;
}

static rv_t open_session(ulong_t slot, ulong_t flags, void *app, void *notify, ulong_t *session)
{
	rv_t rv = fails(OPEN_SESSION);
	return rv ? rv : ((rv_t (*)(ulong_t, ulong_t, void *, void *, ulong_t *))real->f[OPEN_SESSION])(slot, flags, app, notify, session);
}

static rv_t login(ulong_t session, ulong_t user, void *pin, ulong_t len)
{
	if (user == 1) /* CKU_USER */
		atomic_fetch_add(&words[W_LOGINS], 1);
	rv_t rv = fails(LOGIN);
	return rv ? rv : ((rv_t (*)(ulong_t, ulong_t, void *, ulong_t))real->f[LOGIN])(session, user, pin, len);
}

static rv_t get_attribute(ulong_t session, ulong_t object, void *template, ulong_t count)
{
	rv_t rv = fails(GET_ATTRIBUTE);
	return rv ? rv : ((rv_t (*)(ulong_t, ulong_t, void *, ulong_t))real->f[GET_ATTRIBUTE])(session, object, template, count);
}

static rv_t find_init(ulong_t session, void *template, ulong_t count)
{
	rv_t rv = fails(FIND_INIT);
	return rv ? rv : ((rv_t (*)(ulong_t, void *, ulong_t))real->f[FIND_INIT])(session, template, count);
}

static rv_t sign_init(ulong_t session, void *mechanism, ulong_t key)
{
	rv_t rv = fails(SIGN_INIT);
	return rv ? rv : ((rv_t (*)(ulong_t, void *, ulong_t))real->f[SIGN_INIT])(session, mechanism, key);
}

static rv_t sign(ulong_t session, void *data, ulong_t len, unsigned char *sig, ulong_t *siglen)
{
	rv_t rv;
	if (sig != NULL && (rv = fails(SIGN)) != 0)
		return rv;
	if (sig != NULL) {
		unsigned long running = atomic_fetch_add(&words[W_RUNNING], 1) + 1;
		unsigned long peak = atomic_load(&words[W_PEAK]);
		while (running > peak && !atomic_compare_exchange_weak(&words[W_PEAK], &peak, running))
			;
		unsigned long delay = atomic_load(&words[W_DELAY_US]);
		if (delay)
			nap(delay);
		while (atomic_load(&words[W_HANG]) == SIGN)
			nap(1000);
	}
	rv = ((rv_t (*)(ulong_t, void *, ulong_t, void *, ulong_t *))real->f[SIGN])(session, data, len, sig, siglen);
	if (sig != NULL) {
		atomic_fetch_sub(&words[W_RUNNING], 1);
		unsigned long n = atomic_fetch_add(&words[W_SIGNS], 1) + 1;
		unsigned long every = atomic_load(&words[W_CORRUPT_EVERY]);
		if (rv == 0 && every && n % every == 0) {
			sig[*siglen - 1] ^= 1;
			atomic_fetch_add(&words[W_CORRUPTED], 1);
		}
	}
	return rv;
}

static rv_t generate_pair(ulong_t session, void *mechanism, void *public, ulong_t publics,
	void *private, ulong_t privates, ulong_t *pub, ulong_t *priv)
{
	rv_t rv = fails(GENERATE_PAIR);
	return rv ? rv : ((rv_t (*)(ulong_t, void *, void *, ulong_t, void *, ulong_t, ulong_t *, ulong_t *))real->f[GENERATE_PAIR])(session, mechanism, public, publics, private, privates, pub, priv);
}

static rv_t generate_random(ulong_t session, void *out, ulong_t len)
{
	rv_t rv = fails(RANDOM);
	return rv ? rv : ((rv_t (*)(ulong_t, void *, ulong_t))real->f[RANDOM])(session, out, len);
}

rv_t C_GetFunctionList(struct list **out)
{
	if (real == NULL) {
		const char *module = getenv("CHANCERY_SHIM_MODULE");
		const char *control = getenv("CHANCERY_SHIM_CONTROL");
		if (module == NULL || control == NULL)
			return 5; /* CKR_GENERAL_ERROR */
		int fd = open(control, O_RDWR | O_CLOEXEC);
		if (fd < 0)
			return 5;
		void *p = mmap(NULL, W_WORDS * sizeof *words, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		close(fd);
		void *lib = dlopen(module, RTLD_NOW | RTLD_LOCAL);
		if (p == MAP_FAILED || lib == NULL)
			return 5;
		rv_t (*get)(struct list **) = (rv_t (*)(struct list **))dlsym(lib, "C_GetFunctionList");
		struct list *found;
		if (get == NULL || get(&found) != 0)
			return 5;
		words = p;
		ours = *found;
		ours.f[3] = C_GetFunctionList;
		ours.f[GET_TOKEN_INFO] = get_token_info;
		ours.f[OPEN_SESSION] = open_session;
		ours.f[LOGIN] = login;
		ours.f[GET_ATTRIBUTE] = get_attribute;
		ours.f[FIND_INIT] = find_init;
		ours.f[SIGN_INIT] = sign_init;
		ours.f[SIGN] = sign;
		ours.f[GENERATE_PAIR] = generate_pair;
		ours.f[RANDOM] = generate_random;
		real = found;
	}
	*out = &ours;
	return 0;
}
