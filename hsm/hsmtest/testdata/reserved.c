/* A PKCS#11 module before another that adds a pReserved string to C_Initialize
 * (PKCS#11 v2.40, Section 5.4), as p11-kit does for x-init-reserved. NSS's
 * softokn takes its database from there. The module is named by the variable
 * CHANCERY_RESERVED_MODULE when this one is loaded, the string by
 * CHANCERY_RESERVED whenever it is initialised.
 */
#include <dlfcn.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long rv_t;

struct list {
	unsigned char version[2];
	void *f[68];
};

/* CK_C_INITIALIZE_ARGS, with the word more that softokn reads. */
struct arguments {
	void *mutex[4];
	unsigned long flags;
	void *reserved;
	void *more;
};

static struct list *real;
static struct list ours;

static rv_t initialize(void *given)
{
	struct arguments a = { 0 };
	if (given != NULL)
		memcpy(&a, given, offsetof(struct arguments, reserved));
	a.reserved = getenv("CHANCERY_RESERVED");
	return ((rv_t (*)(void *))real->f[0])(&a);
}

rv_t C_GetFunctionList(struct list **out)
{
	if (real == NULL) {
		const char *module = getenv("CHANCERY_RESERVED_MODULE");
		void *lib = module ? dlopen(module, RTLD_NOW | RTLD_LOCAL) : NULL;
		rv_t (*get)(struct list **) = lib ? (rv_t (*)(struct list **))dlsym(lib, "C_GetFunctionList") : NULL;
		struct list *found;
		if (get == NULL || get(&found) != 0)
			return 5; /* CKR_GENERAL_ERROR */
		ours = *found;
		ours.f[0] = initialize;
		ours.f[3] = C_GetFunctionList;
		real = found;
	}
	*out = &ours;
	return 0;
}
